"""Bytes of a file to values, believing nothing, and back: JSON and safetensors (github.com/huggingface/safetensors, "Format").

Everything is checked against the bytes that were read before memory is taken: sizes against offsets, offsets against the file's length.
What is not said exactly once, in the one way that the format has, is refused. Next file: ``lora/config.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from minilora.errors import CheckpointError, StateError

__all__ = ["Entry", "Header", "once", "parse_header", "parse_json", "parse_tensors", "tensor_at", "tensor_bytes"]

LONGEST_JSON = 10_000_000  # bytes; a header of 100,000 tensors' names and no more
MOST_TENSORS = 65_536
_DEEPEST = 20  # objects and lists in one another
_MOST_SIDES = 16  # dimensions of a tensor
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: ``shape`` in elements, ``begin`` in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds: tensors by name, and ``metadata``, text to text."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def parse_json(raw: bytes | bytearray) -> dict[str, Any]:
    """A JSON object without duplicate keys, in UTF-8.

    Raises:
        ValueError: it is none, or longer than 10 MB; the message is for the caller to put a path before.
    """
    if len(raw) > LONGEST_JSON:
        raise ValueError(f"{len(raw):,} bytes of JSON; at most {LONGEST_JSON:,} are read")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}; wanted an object")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        inner = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inner if isinstance(value, (dict, list))]
    if level:
        raise ValueError("nested too deeply")
    return content


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of ``json.loads`` (``object_pairs_hook``). Raises ``ValueError`` for a key that comes twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:100]!r} comes twice")
    return content


def parse_header(raw: bytes | bytearray, where: object, size: int | None = None) -> Header:
    """The checked header of a safetensors file.

    Args:
        raw: all bytes of it, or its first ones: ``8 + LONGEST_JSON`` are enough. where: its path, for messages.
        size: bytes of the whole file, where ``raw`` is not all of it.

    Raises:
        CheckpointError: it is not one, lies about its sizes, or is larger than any adapter: what is wrong, and the file's length.
    """
    size = len(raw) if size is None else size
    try:
        return _header(raw, size)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: damaged safetensors file of {size} bytes ({error}); copy or save it again"
        ) from None


def _header(raw: bytes | bytearray, size: int) -> Header:
    if len(raw) < 8:
        raise ValueError("too short for its 8 bytes of header length")
    length = int.from_bytes(raw[:8], "little")
    if length > LONGEST_JSON:
        raise ValueError(f"header of {length:,} bytes; at most {LONGEST_JSON:,} are read")
    start = 8 + length
    if start > size:
        raise ValueError(f"header of {length} bytes goes past the end")
    if raw[8:9] != b"{":
        raise ValueError("header does not begin with {")
    content = parse_json(raw[8:start])
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no object of texts")
    if len(content) > MOST_TENSORS:
        raise ValueError(f"{len(content):,} tensors; at most {MOST_TENSORS:,} are read")
    entries = {name: _entry(name, value, start) for name, value in content.items()}
    _refuse_gaps(entries, start, size)
    return Header(entries, metadata)


def _entry(name: str, value: Any, start: int) -> Entry:
    def wrong(what: str) -> NoReturn:
        raise ValueError(f"tensor {name[:200]!r}: {what}")

    if not is_name(name):
        wrong("name is empty, or has signs that cannot be printed")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        wrong("wanted exactly dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        wrong(f"dtype {str(kind)[:50]!r} is not one of {', '.join(_DTYPES)}")
    if not _counts(shape) or len(shape) > _MOST_SIDES:
        wrong("shape is no list of sizes")
    if math.prod(side for side in shape if side) >= 2**48:  # of no elements, and still more than can be counted through
        wrong("shape is larger than any tensor")
    if not _counts(offsets) or len(offsets) != 2:
        wrong("data_offsets are no two offsets")
    size = math.prod(shape) * _DTYPES[kind].itemsize
    if offsets[1] - offsets[0] != size:
        wrong(f"data_offsets span {offsets[1] - offsets[0]} bytes, dtype and shape mean {size}")
    return Entry(_DTYPES[kind], tuple(shape), start + offsets[0])


def is_name(name: str) -> bool:
    """Whether a tensor may be called so, when it is read and when it is written: text that a terminal shows as it is."""
    return bool(name) and name.isprintable()


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**48 for number in value)


def _refuse_gaps(entries: dict[str, Entry], start: int, end: int) -> None:
    """Tensors must fill the file: one after the other, no byte between, none over."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, math.prod(item[1].shape))):
        if entry.begin != at:
            raise ValueError(f"tensor {name[:200]!r} begins at byte {entry.begin}, the one before ends at {at}")
        at += entry.nbytes
    if at != end:
        raise ValueError(f"its tensors end at byte {at}")


def parse_tensors(raw: bytearray, where: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; the tensors lie in ``raw``, nothing is copied. Raises as ``parse_header``."""
    header = parse_header(raw, where)
    return {name: tensor_at(raw, entry) for name, entry in header.entries.items()}, header.metadata


def tensor_at(raw: bytearray, entry: Entry) -> Tensor:
    """The tensor of an entry, in ``raw`` where it lies aligned there."""
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    if entry.begin % entry.dtype.itemsize:
        raw, entry = raw[entry.begin : entry.begin + count * entry.dtype.itemsize], Entry(entry.dtype, entry.shape, 0)
    return torch.frombuffer(raw, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; equal tensors and metadata give equal bytes. Wide dtypes come first, so that every tensor lies aligned.

    Raises:
        StateError: a name that the reader would refuse.
    """
    if odd := [name for name in tensors if not is_name(name)]:
        raise StateError(
            f"tensor {odd[0][:200]!r}: its name is empty, or has signs that cannot be printed; rename the module"
        )
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, at = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0])):
        part = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        offsets = [at, at + len(part)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(part)
        at += len(part)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
