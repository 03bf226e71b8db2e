"""Numbers that are read by place: in memory, or in a file that is mapped, of which no more stays in memory than was read lately."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pages"]

_MOST = 8_000_000  # bytes that are mapped until all are let go; the system keeps what it has room for
_AROUND = 65_536  # bytes that Linux maps around one that is asked for


class Pages:
    """int32 numbers, little-endian. ``source`` is their bytes, or the file that holds them."""

    def __init__(self, source: bytes | bytearray | Path) -> None:
        self._mapped: mmap.mmap | None = None
        if isinstance(source, Path):
            with source.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._numbers: NDArray[np.int32] = np.frombuffer(self._mapped, "<i4")
        else:
            self._numbers = np.frombuffer(source, "<i4")
        self._read = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, start: int, count: int) -> NDArray[np.int32]:
        """A copy of ``count`` numbers from ``start`` on."""
        found = self._numbers[start : start + count].copy()
        self._read += found.nbytes + _AROUND
        if self._mapped is not None and self._read > _MOST and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(
                mmap.MADV_DONTNEED
            )  # a page that is asked for again comes from the system's memory, or the file
            self._read = 0
        return found
