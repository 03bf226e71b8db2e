"""GGUF files of somebody who knows the format: refused in one line and soon, or read to the bytes that lie there."""

import os
import struct
import time

import pytest
import torch

pytest.importorskip("gguf")
import gguf

from minilora.errors import CheckpointError, MissingPackageError
from minilora.gguf import kinds
from minilora.gguf.file import gguf_in, has_blocks, open_gguf

HEAD = struct.Struct("<4sIQQ")
TEXT, ARRAY, U32 = 8, 9, 4


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(name, kind, raw):
    return text(name) + struct.pack("<I", kind) + raw


def entry(name, shape, kind=0, offset=0):
    sides = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sides + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair("general.architecture", TEXT, text("llama"))


def written(path, pairs=(ARCHITECTURE,), tensors=(), data=b"", counts=None, version=3, magic=b"GGUF"):
    """A file of these parts, its data behind the header at a multiple of 32."""
    count = counts or (len(tensors), len(pairs))
    head = HEAD.pack(magic, version, *count) + b"".join(pairs) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def refused(path, words):
    began = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught, open_gguf(path):
        pass
    assert time.process_time() - began < 5
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_tensors_are_the_bytes_that_lie_there(path):
    draw = torch.Generator().manual_seed(0)
    numbers = {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(64, generator=draw)}
    packed = gguf.quants.quantize(torch.randn(7, 64, generator=draw).numpy(), gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("a.list", [1, 2, 3])
    writer.add_array("a.words", ["one", "zwei"])
    for name, tensor in numbers.items():
        writer.add_tensor(name, tensor.numpy())
    writer.add_tensor("half", numbers["a"].half().numpy())
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        assert file.architecture == "llama"
        assert (file.metadata["a.list"], file.metadata["a.words"]) == ([1, 2, 3], ["one", "zwei"])
        assert {name: (info.kind.name, info.shape) for name, info in file.tensors.items()} == {
            "a": ("F32", (5, 3)), "b": ("F32", (64,)), "half": ("F16", (5, 3)), "packed": ("Q4_1", (7, 64)),
        }  # fmt: skip
        for name, tensor in numbers.items():
            assert torch.equal(file.values(name), tensor)
        assert torch.equal(file.values("half"), numbers["a"].half().float())
        assert torch.equal(file.values("a", torch.bfloat16), numbers["a"].bfloat16())
        assert torch.equal(file.blocks("packed"), torch.from_numpy(packed))
        assert torch.equal(file.blocks("packed", 2, 5), torch.from_numpy(packed[2:5]))
        dense = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1))
        assert torch.equal(file.values("packed"), dense)


@pytest.mark.parametrize("kind", ["TQ2_0", "IQ4_XS", "IQ4_NL", "BF16"])
def test_other_types_are_decoded_as_gguf_decodes_them(path, kind):
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = torch.randint(
        0, 60, (3 * 512 // block * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    written(path, tensors=[entry("blk.0.w", (3, 512), number.value)], data=raw.numpy().tobytes())
    with open_gguf(path) as file:
        own = torch.from_numpy(gguf.dequantize(raw.view(3, -1).numpy(), number))
        assert torch.equal(file.values("blk.0.w"), own)
    assert not has_blocks(path)


def test_a_large_tensor_is_decoded_in_pieces(path, monkeypatch):
    monkeypatch.setattr("minilora.gguf.file._ROWS", 40)
    rows = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    written(path, tensors=[entry("w", (9, 16))], data=rows.numpy().tobytes())
    with open_gguf(path) as file:
        assert torch.equal(file.values("w"), rows)


# ---- places


def test_a_folder_with_one_file_is_that_file(tmp_path):
    assert gguf_in(tmp_path) is None
    one = written(tmp_path / "a.gguf")
    assert gguf_in(tmp_path) == gguf_in(one) == one
    written(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(a.gguf, b.gguf ...\); name one"):
        gguf_in(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # a model of transformers
    assert gguf_in(tmp_path) is None
    assert gguf_in("org/model") is None


def test_what_is_no_file_is_said(tmp_path):
    refused(tmp_path / "none.gguf", "no such file")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "is no file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        refused(tmp_path / "pipe.gguf", "is no file")


def test_without_gguf_the_way_to_it_is_said(path, monkeypatch):
    written(path)
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"needs gguf; run 'pip install minilora\[gguf\]'"), open_gguf(path):
        pass


# ---- hostile headers


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"magic": b"GGML"}, "is no GGUF file"),
        ({"version": 1}, "is GGUF version 1; wanted 2 or 3"),
        ({"version": 3 << 24}, "big-endian"),
        ({"counts": (2**63, 1)}, "says that it has 9,223,372,036,854,775,808 tensors"),
        ({"counts": (0, 2**40)}, "1,099,511,627,776 pairs of metadata"),
        ({"counts": (0, 9)}, "copy or download it again"),
        ({"counts": (9, 1)}, "copy or download it again"),
        ({"pairs": [struct.pack("<Q", 2**62)]}, "has a text of 4,611,686,018,427,387,904 bytes"),
        ({"pairs": [struct.pack("<Q", 60_000)]}, "ends within its header"),
        ({"pairs": [text(b"\xff\xfe") + bytes(8)]}, "is not UTF-8"),
        ({"pairs": [ARCHITECTURE, ARCHITECTURE]}, "says 'general.architecture' twice"),
        ({"pairs": [pair("x", 77, bytes(8))]}, "has 'x' of a type 77"),
        ({"pairs": [pair("x", ARRAY, struct.pack("<IQ", U32, 2**61))]}, "has 2,305,843,009,213,693,952 items in 'x'"),
        ({"pairs": [pair("x", ARRAY, struct.pack("<IQ", U32, 2**21))]}, "ends within its header"),
        ({"pairs": [pair("x", ARRAY, struct.pack("<IQ", TEXT, 2**21))]}, "ends within its header|has a text of"),
        ({"pairs": [pair("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(32))]}, "has 'x' of a type 9"),
        ({"pairs": [pair("general.alignment", U32, struct.pack("<I", 0))]}, "alignment=0; wanted a power of two"),
        ({"pairs": [pair("general.alignment", U32, struct.pack("<I", 48))]}, "alignment=48"),
        ({"pairs": [pair("general.alignment", TEXT, text("x"))]}, "alignment='x'"),
        ({"tensors": [entry("w", (4, 4), offset=1)], "data": bytes(96)}, "'w' at 1, which is no multiple of 32"),
        ({"tensors": [entry("w", (4, 4))], "data": bytes(63)}, "it is cut off"),
        ({"tensors": [entry("w", (4, 4), offset=2**62)], "data": bytes(64)}, "it is cut off"),
        ({"tensors": [entry("w", (2**40, 2**40))], "data": bytes(64)}, "it is cut off"),
        ({"tensors": [entry("w", (0, 4))], "data": bytes(64)}, r"of shape \[0, 4\]"),
        ({"tensors": [entry("w", (4, 33), 3)], "data": bytes(640)}, r"of shape \[4, 33\] as Q4_1, in blocks of 32"),
        ({"tensors": [entry("w", (4,) * 5)], "data": bytes(64)}, "with 5 sides; the format has 1 to 4"),
        ({"tensors": [entry("w", ())], "data": bytes(64)}, "with 0 sides"),
        ({"tensors": [entry("w", (4,), 9999)], "data": bytes(64)}, "of a type 9999 that gguf .* does not know"),
        ({"tensors": [entry("w", (4,)), entry("w", (4,), offset=32)], "data": bytes(64)}, "has the tensor 'w' twice"),
        ({"tensors": [entry("v", (4, 4)), entry("w", (4,), offset=32)], "data": bytes(64)}, "has 'w' over 'v'"),
        ({"pairs": [pair("split.count", 2, struct.pack("<H", 3))]}, "is one of 3 parts of a model.*llama-gguf-split --merge"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(path, parts, words):
    refused(written(path, **parts), words)


def test_an_empty_file_and_a_short_one_are_refused(path):
    for size in (0, 3, 23):
        path.write_bytes(b"GGUF" + bytes(size) if size > 3 else bytes(size))
        refused(path, "is no GGUF file|says that it has|is GGUF version 0")


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_file_that_ends_anywhere_is_refused(path, every):
    pairs = [ARCHITECTURE, pair("x", ARRAY, struct.pack("<IQ", TEXT, 2) + text("one") + text("two"))]
    whole = written(path, pairs, [entry("w", (4, 4)), entry("v", (8,), offset=64)], bytes(96)).read_bytes()
    for size in range(0, len(whole), every):
        path.write_bytes(whole[:size])
        refused(path, "copy or download it again")


def test_a_part_of_several_is_refused_by_name(tmp_path):
    refused(written(tmp_path / "model-00002-of-00003.gguf"), "is one of 3 parts of a model; put them together")


def test_a_value_of_another_type_is_refused(path):
    written(path, [pair("general.architecture", U32, struct.pack("<I", 5))])
    with open_gguf(path) as file, pytest.raises(CheckpointError, match=r"general.architecture=5; wanted a text"):
        _ = file.architecture


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(path):
    written(path, tensors=[entry("w", (64, 64))], data=bytes(64 * 64 * 4))
    with open_gguf(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match="ends within 'w'; it was cut off while it was read"):
            file.values("w")
