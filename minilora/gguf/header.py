"""What a GGUF file says before its weights: metadata and the table of its tensors, believed in nothing.

The format (github.com/ggml-org/ggml, docs/gguf.md), little-endian: the letters ``GGUF``, a version, how many tensors and how many pairs
there are; the pairs, each a name, a type and a value; for each tensor a name, its sides (the fastest first), a type, and where it begins
behind the header. Every length is compared with what is left of the file before memory is taken. Next file: ``gguf/file.py``.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.disk import Opened
from minilora.files.validate import shown
from minilora.gguf.kinds import Kind, kind_of

__all__ = ["ALIGNMENT", "Info", "read_header"]

ALIGNMENT = "general.alignment"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_PAIRS, _MOST_TENSORS, _MOST_ITEMS = 65_536, 65_536, 1 << 22  # of items: 16 times the longest vocabulary
_LONGEST_NAME, _LONGEST_TEXT = 65_535, 1 << 24  # bytes
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_WINDOW = 1 << 20  # bytes of the file that are read at once


@dataclass(frozen=True)
class Info:
    """One tensor of the table: ``shape`` as torch has it, ``begin`` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) // self.kind.block * self.kind.bytes


def read_header(file: Opened, path: object) -> tuple[dict[str, Any], dict[str, Info]]:
    """Metadata by name, and tensors by name in the order of the table.

    Raises:
        CheckpointError: it is no GGUF file, of another version, cut off, or says what cannot be; the message says what.
    """
    header = _Header(file, path)
    tensors, pairs = header.begin()
    metadata = header.pairs(pairs)
    every = header.tensors(tensors, header.alignment(metadata))
    header.refuse_outside(every)
    return metadata, {info.name: info for info in every}


class _Header:
    """A place in the file that moves on with whatever is taken."""

    def __init__(self, file: Opened, path: object) -> None:
        self.file, self.path, self.at = file, path, 0
        self.window, self.start = bytearray(), 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; copy or download it again")

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > self.file.size - self.at:
            raise self.wrong(f"ends within its header, at byte {self.file.size:,}")
        if self.at + count > self.start + len(self.window):
            self.window, self.start = self.file.read(self.at, max(count, _WINDOW)), self.at
            if len(self.window) < count:
                raise self.wrong("was cut off while it was read")
        begin = self.at - self.start
        self.at += count
        return bytes(self.window[begin : begin + count])

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """The next numbers of one kind, as ``struct`` calls it."""
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self, longest: int = _LONGEST_TEXT) -> str:
        (length,) = self.values("Q")
        if length > longest:
            raise self.wrong(f"has a text of {length:,} bytes in its header; at most {longest:,} are read")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"has a text that is not UTF-8 before byte {self.at:,}") from None

    def begin(self) -> tuple[int, int]:
        """How many tensors and pairs there are."""
        if self.file.size < 24 or self.take(4) != _MAGIC:
            raise self.wrong("is no GGUF file (it does not begin with the letters GGUF)")
        (version,) = self.values("I")
        if version not in _VERSIONS:
            order = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self.path}: is GGUF version {version}{order}; wanted 2 or 3, little-endian")
        tensors, pairs = self.values("Q", 2)
        for count, most, what in ((tensors, _MOST_TENSORS, "tensors"), (pairs, _MOST_PAIRS, "pairs of metadata")):
            if count > most:
                raise self.wrong(f"says that it has {count:,} {what}; at most {most:,} are read")
        return tensors, pairs

    def pairs(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(_LONGEST_NAME)
            if name in found:
                raise self.wrong(f"says {shown(name)} twice")
            (kind,) = self.values("I")
            found[name] = self.items(name) if kind == _ARRAY else self.one(kind, name)
        return found

    def one(self, kind: int, name: str) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind not in _SCALARS:
            raise self.wrong(f"has {shown(name)} of a type {kind} that the format has not")
        return self.values(_SCALARS[kind])[0]

    def items(self, name: str) -> list[Any]:
        """The items of an array; none is an array itself, as in every file that programs write."""
        (kind,), (count,) = self.values("I"), self.values("Q")
        if count > _MOST_ITEMS:
            raise self.wrong(f"has {count:,} items in {shown(name)}; at most {_MOST_ITEMS:,} are read")
        if kind in _SCALARS:
            return list(self.values(_SCALARS[kind], count))
        return [self.one(kind, name) for _ in range(count)]

    def alignment(self, metadata: dict[str, Any]) -> int:
        found = metadata.get(ALIGNMENT, 32)
        if type(found) is not int or not 8 <= found <= 1 << 20 or found & (found - 1):
            raise self.wrong(f"says {ALIGNMENT}={shown(found)}; wanted a power of two")
        return found

    def tensors(self, count: int, alignment: int) -> list[Info]:
        table = [self._entry() for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        names = set()
        for name, *_, offset in table:
            if name in names:
                raise self.wrong(f"has the tensor {shown(name)} twice")
            names.add(name)
            if offset % alignment:
                raise self.wrong(f"has {shown(name)} at {offset:,}, which is no multiple of {alignment}")
        return [Info(name, shape, kind, start + offset) for name, shape, kind, offset in table]

    def _entry(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name = self.text(_LONGEST_NAME)
        (sides,) = self.values("I")
        if not 1 <= sides <= 4:
            raise self.wrong(f"has {shown(name)} with {sides:,} sides; the format has 1 to 4")
        shape = tuple(reversed(self.values("Q", sides)))
        number, offset = *self.values("I"), *self.values("Q")
        kind = kind_of(number)
        if kind is None:
            raise CheckpointError(
                f"{self.path}: {shown(name)} is of a type {number} that gguf {_version()} does not know; "
                "run 'pip install --upgrade gguf'"
            )
        if 0 in shape or shape[-1] % kind.block:
            raise self.wrong(f"has {shown(name)} of shape {list(shape)} as {kind.name}, in blocks of {kind.block}")
        return name, shape, kind, offset

    def refuse_outside(self, every: list[Info]) -> None:
        """Raise ``CheckpointError`` for a tensor that ends behind the file, or lies over another one."""
        last, before = 0, ""
        for info in sorted(every, key=lambda info: info.begin):
            if info.begin < last:
                raise self.wrong(f"has {shown(info.name)} over {shown(before)}")
            last, before = info.begin + info.nbytes, info.name
            if last > self.file.size:
                need = f"{last:,} bytes for {shown(info.name)}"
                raise self.wrong(f"has {self.file.size:,} bytes, and its header wants {need}: it is cut off")


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
