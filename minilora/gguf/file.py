"""One GGUF file, open: its metadata, and its tensors one at a time. Memory holds what was asked for, and never the file.

The file is read by places and not mapped: what is cut off meanwhile is an error and no dead process. Decoding what is not kept in its
blocks is left to the ``gguf`` package. Next file: ``hf/gguf_model.py``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError
from minilora.files import disk
from minilora.files.read import refuse_path
from minilora.files.validate import shown
from minilora.gguf.header import Info, read_header
from minilora.gguf.kinds import import_gguf
from minilora.quant.gguf.formats import FORMATS

__all__ = ["GGUF", "SUFFIX", "gguf_in", "has_blocks", "open_gguf"]

SUFFIX = ".gguf"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list"}
_ROWS = 1 << 22  # weights that are decoded at a time


class GGUF:
    """An open file.

    Attributes:
        path: the file. metadata: names to numbers, texts, and lists of them. tensors: names to shapes, types and places.
    """

    def __init__(self, path: Path, file: disk.Opened) -> None:
        self.path, self._file = path, file
        self.metadata, self.tensors = read_header(file, path)

    def said(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata. Raises ``CheckpointError`` where it is none of ``kind`` (of float: no finite number)."""
        value = self.metadata.get(name)
        if value is None:
            return default
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool) or (kind is float and not math.isfinite(value)):
            raise self._wrong(name, value, _WORDS[kind])
        return value

    def items(self, name: str, kind: type) -> list[Any]:
        """A list of the metadata, empty where there is none. Raises ``CheckpointError`` where an item is none of ``kind``."""
        found: list[Any] = self.said(name, list, [])
        if wrong := [item for item in found if not isinstance(item, (int, float) if kind is float else kind)]:
            raise self._wrong(name, wrong[0], f"a list, each item {_WORDS[kind]}")
        return found

    def count(self, name: str, default: int | None = None) -> int | None:
        """A whole number; llama.cpp takes a list of one for each layer, too. Raises ``CheckpointError`` for all else."""
        value = self.metadata.get(name)
        if not isinstance(value, list):
            return self.said(name, int, default)
        layers = self.said(f"{self.architecture}.block_count", int)
        if len(value) != layers or len(set(value)) != 1 or type(value[0]) is not int:
            raise self._wrong(name, value, "a whole number, the same for all layers")
        return value[0]

    def _wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: its metadata says {name}={shown(value)}; wanted {wanted}")

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model. Raises ``CheckpointError`` where the file names none."""
        found = self.said("general.architecture", str)
        if not found:
            raise CheckpointError(f"{self.path}: names no general.architecture; wanted a language model's GGUF file")
        return str(found)

    def blocks(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """The bytes of rows ``first`` to ``last`` of a tensor, as they lie in the file: uint8 ``[rows, bytes a row]``."""
        info = self.tensors[name]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        last = rows if last is None else last
        each = info.nbytes // rows
        return torch.frombuffer(self._read(info, first * each, (last - first) * each), dtype=torch.uint8).view(-1, each)

    def values(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor decoded, ``[sides]`` in ``dtype``: each number is fp32 before it is rounded, once."""
        info = self.tensors[name]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        width = torch.Size(info.shape).numel() // rows
        dense = torch.empty(rows, width, dtype=dtype)
        step = max(1, _ROWS // width)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            dense[first:last] = decoded(self.blocks(name, first, last), info.kind.name).view(-1, width)
        return dense.view(info.shape)

    def some(self, name: str, places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Numbers at places of the flattened tensor, fp32, and how far each may lie from what was packed into its block: 0 for numbers
        that are in none, None where that is not known of the type. Only their blocks are read.
        """
        info = self.tensors[name]
        kind, block, size = info.kind.name, info.kind.block, info.kind.bytes
        raw = b"".join(bytes(self._read(info, place // block * size, size)) for place in places)
        blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, size)
        at = torch.tensor([place % block for place in places])[:, None]
        values = decoded(blocks, kind).view(-1, block).gather(1, at).flatten()
        if kind not in FORMATS:
            return values, torch.zeros_like(values) if info.kind.plain is not None else None
        slack = FORMATS[kind].slack(blocks)
        return values, slack.gather(1, at // (block // slack.shape[1])).flatten()

    def _read(self, info: Info, begin: int, count: int) -> bytearray:
        try:
            raw = self._file.read(info.begin + begin, count)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}); check the path") from None
        if len(raw) < count:
            raise CheckpointError(
                f"{self.path}: ends within {shown(info.name)}; it was cut off while it was read, copy it again"
            )
        return raw


def decoded(raw: Tensor, kind: str) -> Tensor:
    """Bytes of whole rows as fp32, by the ``gguf`` package, whose functions are tested against llama.cpp's own."""
    gguf = import_gguf()
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16", "F64"):
        return raw.view({"F32": torch.float32, "F16": torch.float16, "F64": torch.float64}[kind]).float()
    try:
        return torch.from_numpy(gguf.dequantize(raw.numpy(), number))
    except (NotImplementedError, KeyError):
        raise CheckpointError(
            f"tensors of type {kind} cannot be decoded by gguf; make the file anew in another type"
        ) from None


def gguf_in(place: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a place is, or that lies in it alone: a folder with a config is a model of transformers. None for anything else.

    Raises:
        CheckpointError: several lie there, and nothing says which one is meant.
    """
    path = Path(place)
    refuse_path(path)
    if not path.is_dir():
        return path if path.suffix == SUFFIX else None
    found = [] if (path / "config.json").exists() else sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {len(found)} GGUF files ({found[0].name}, {found[1].name} ...); name one")
    return found[0] if found else None


def has_blocks(path: Path) -> bool:
    """Whether a file has matrices in blocks that stay packed; without, it is a file of numbers like any other."""
    with open_gguf(path) as file:
        return any(
            info.kind.name in FORMATS and len(info.shape) == 2 and name.startswith("blk.")
            for name, info in file.tensors.items()
        )


@contextmanager
def open_gguf(path: str | os.PathLike[str]) -> Iterator[GGUF]:
    """The file, its header read and checked.

    Raises:
        CheckpointError: it is not there, cannot be read, is one part of several, or no whole GGUF file; nothing of its size was read then.
    """
    place = Path(path)
    refuse_path(place)
    if not place.is_file():
        what = "is no file" if place.exists() else "no such file"
        raise CheckpointError(f"{place}: {what}; wanted a GGUF file")
    import_gguf()
    try:
        opened = disk.used.open(place)
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read ({error.strerror}); check the path") from None
    with closing(opened):
        found = GGUF(place, opened)
        _refuse_parts(found)
        yield found


def _refuse_parts(found: GGUF) -> None:
    part, count = _PART.search(found.path.name), found.said("split.count", int, 1)
    if (part and part[2] != "00001") or count > 1:
        raise CheckpointError(
            f"{found.path}: is one of {int(part[2]) if part else count} parts of a model; put them together with "
            "'llama-gguf-split --merge FIRST_PART WHOLE.gguf', and name that file"
        )
