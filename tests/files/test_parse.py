"""The reader of bytes at its edges: the last file that is taken, and the first that is not, without a model."""

import json
import math
import struct

import pytest
import safetensors.torch
import torch

from minilora.errors import CheckpointError
from minilora.files import parse
from minilora.files.parse import parse_header, parse_json, parse_tensors


def file(header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(raw)) + raw + body)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def deep(levels):
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_json_of_exactly_the_longest_length_is_read(monkeypatch):
    monkeypatch.setattr(parse, "LONGEST_JSON", 20)
    assert parse_json(b'{"a": 1}'.ljust(20)) == {"a": 1}
    with pytest.raises(ValueError, match="21 bytes of JSON; at most 20 are read"):
        parse_json(b'{"a": 1}'.ljust(21))
    assert parse_header(file(b"{}".ljust(20)), "x").entries == {}
    with pytest.raises(CheckpointError, match="header of 21 bytes; at most 20 are read"):
        parse_header(file(b"{}".ljust(21)), "x")


def test_twenty_levels_are_read_and_no_more():
    assert parse_json(deep(20))
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(deep(21))
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b'{"a":' + b"[" * 20 + b"]" * 20 + b"}")
    assert parse_json(b'{"a":' + b"[" * 19 + b"]" * 19 + b', "b": [1, {"c": "d"}]}')


def test_what_comes_twice_is_named_and_cut():
    with pytest.raises(ValueError, match=r"^key 'b' comes twice$"):
        parse_json(b'{"a": 1, "b": 2, "c": 3, "b": 2}')
    with pytest.raises(ValueError, match=r"^key 'x{100}' comes twice$"):
        parse_json(b'{"%s": 1, "%s": 1}' % ((b"x" * 300,) * 2))


@pytest.mark.parametrize("length", range(9))
def test_a_file_that_is_too_short(length):
    words = "too short for its 8 bytes" if length < 8 else "header does not begin with"
    with pytest.raises(CheckpointError, match=f"x: damaged safetensors file of {length} bytes .{words}"):
        parse_header(bytes(length), "x")


def test_a_header_ends_where_it_says():
    raw = file({"a": entry([2], 0, 8)}, bytes(8))
    header = parse_header(raw, "x")
    assert header.entries["a"] == parse.Entry(torch.float32, (2,), len(raw) - 8) and header.metadata == {}
    assert parse_header(file(b"{}"), "x").entries == {}
    with pytest.raises(CheckpointError, match="header of 3 bytes goes past the end"):
        parse_header(struct.pack("<Q", 3) + b"{}", "x")
    with pytest.raises(CheckpointError, match="header of 72,057,594,037,927,938 bytes; at most"):
        parse_header(struct.pack("<Q", 2 | 1 << 56) + b"{}", "x")


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": "b", "c": None}, [], "text", None])
def test_metadata_are_texts(metadata):
    assert parse_header(file({"__metadata__": {"a": "b"}}), "x").metadata == {"a": "b"}
    with pytest.raises(CheckpointError, match="__metadata__ is no object of texts"):
        parse_header(file({"__metadata__": metadata}), "x")


def test_as_many_tensors_as_allowed(monkeypatch):
    monkeypatch.setattr(parse, "MOST_TENSORS", 3)
    three = {f"t{at}": entry([0], 0, 0) for at in range(3)}
    assert len(parse_header(file(three | {"__metadata__": {}}), "x").entries) == 3
    with pytest.raises(CheckpointError, match="4 tensors; at most 3 are read"):
        parse_header(file(three | {"t3": entry([0], 0, 0)}), "x")


GOOD = {
    "a scalar": entry([], 0, 4),
    "sixteen sides": entry([1] * 16, 0, 4),
    "a byte each": entry([4], 0, 4, "U8"),
    "two bytes each": entry([1, 2], 0, 4, "BF16"),
}


@pytest.mark.parametrize("case", GOOD)
def test_entries_that_fill_four_bytes(case):
    assert parse_header(file({"a": GOOD[case]}, bytes(4)), "x").entries["a"].shape == tuple(GOOD[case]["shape"])


SHAPE, OFFSETS = "shape is no list of sizes", "data_offsets are no two offsets"
FIELDS = "wanted exactly dtype, shape and data_offsets"
BAD = {
    "seventeen sides": (entry([1] * 17, 0, 4), SHAPE),
    "shape of text": (entry("1", 0, 4), SHAPE),
    "shape of numbers with a point": (entry([1.0], 0, 4), SHAPE),
    "shape below zero": (entry([-1], 0, 4), SHAPE),
    "a side of 2^48": (entry([2**48], 0, 4), SHAPE),
    "an offset of 2^48": (entry([1], 0, 2**48), OFFSETS),
    "one offset": (entry([1], 0, 4) | {"data_offsets": [4]}, OFFSETS),
    "three offsets": (entry([1], 0, 4) | {"data_offsets": [0, 4, 4]}, OFFSETS),
    "offsets below zero": (entry([1], -4, 0), OFFSETS),
    "offsets turned round": (entry([1], 4, 0), "data_offsets span -4 bytes, dtype and shape mean 4"),
    "bytes of another size": (entry([1], 0, 4, "F64"), "data_offsets span 4 bytes, dtype and shape mean 8"),
    "no dtype": ({"shape": [1], "data_offsets": [0, 4]}, FIELDS),
    "a list": ([1], FIELDS),
    "a dtype of a list": (entry([1], 0, 4, ["F32"]), "is not one of F64"),
    "an unknown dtype": (entry([1], 0, 4, "F4"), "dtype 'F4' is not one of F64"),
}


@pytest.mark.parametrize("case", BAD)
def test_entries_that_lie(case):
    value, words = BAD[case]
    with pytest.raises(CheckpointError, match=f"tensor 'a': .*{words}"):
        parse_header(file({"a": value}, bytes(4)), "x")


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2J", "\u202e"])
def test_names_that_cannot_be_shown(name):
    with pytest.raises(CheckpointError, match="name is empty, or has signs that cannot be printed"):
        parse_header(file({name: entry([1], 0, 4)}, bytes(4)), "x")


def test_the_largest_side_is_below_two_to_the_48():
    with pytest.raises(CheckpointError, match=f"data_offsets span 4 bytes, dtype and shape mean {2**50 - 4}"):
        parse_header(file({"a": entry([2**48 - 1], 0, 4)}, bytes(4)), "x")


def test_tensors_follow_one_another_in_any_order_of_names():
    body = struct.pack("<2f", 1.5, 2.5) + b"\x07"
    found, _ = parse_tensors(
        file({"b": entry([1], 8, 9, "U8"), "a": entry([2], 0, 8), "none": entry([0, 3], 0, 0)}, body), "x"
    )
    assert found["a"].tolist() == [1.5, 2.5] and found["b"].tolist() == [7] and found["none"].shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ({"a": entry([1], 4, 8)}, 8, "tensor 'a' begins at byte .*, the one before ends at"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "tensor 'b' begins"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8, "tensor 'b' begins"),
        ({"a": entry([1], 0, 4)}, 5, "its tensors end at byte"),
        ({"a": entry([1], 0, 4)}, 3, "its tensors end at byte"),
        ({}, 1, "its tensors end at byte 10"),
    ],
)
def test_holes_overlaps_and_what_is_over(header, body, words):
    with pytest.raises(CheckpointError, match=words):
        parse_header(file(header, bytes(body)), "x")


@pytest.mark.parametrize("dtype", parse._DTYPES.values(), ids=str)
def test_every_dtype_is_what_safetensors_wrote(dtype):
    tensor = (torch.arange(15) % 2 + 1).to(dtype).view(3, 5)
    found, metadata = parse_tensors(bytearray(safetensors.torch.save({"a": tensor}, {"format": "pt"})), "x")
    assert metadata == {"format": "pt"} and found["a"].dtype == dtype and torch.equal(found["a"], tensor)


def test_a_tensor_that_does_not_lie_on_its_own_size_is_copied():
    raw = file({"a": entry([1], 0, 1, "U8"), "b": entry([2], 1, 9)}, b"\x07" + struct.pack("<2f", 2.5, math.pi))
    for more in range(4):  # the header's length decides how the tensors lie
        text = bytes(raw[8:-9]) + b" " * more
        found, _ = parse_tensors(file(text, bytes(raw[-9:])), "x")
        assert found["a"].item() == 7 and found["b"].tolist() == torch.tensor([2.5, math.pi]).tolist()


def test_tensors_lie_in_the_bytes_that_were_read():
    raw = file(json.dumps({"a": entry([2], 0, 8)}).encode().ljust(64), bytes(8))
    found, _ = parse_tensors(raw, "x")
    raw[-8:] = struct.pack("<2f", 3.0, 4.0)
    assert found["a"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("raw", "kind"), [(b"[1]", "list"), (b"1", "int"), (b"null", "NoneType"), (b'"a"', "str")])
def test_json_that_is_no_object(raw, kind):
    with pytest.raises(ValueError, match=f"holds a {kind}; wanted an object"):
        parse_json(raw)
