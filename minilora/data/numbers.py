"""Numbers that are read by place: in memory, or in a file, of which the process holds nothing.

A file is read with ``pread`` and not mapped into memory: what is read often stays in the system's cache either way, and pages that are
mapped would count as the process's until the system wants them back (it maps 64 KB and more around each number that is asked for). Nor
does a file that is cut short while it is mapped end the process.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Numbers", "Shelf"]

_SIZE = 4  # bytes of a number


class Numbers:
    """int32 numbers, little-endian. ``source`` is their bytes, or the file that holds them."""

    def __init__(self, source: bytes | bytearray | Path) -> None:
        self._content, self._handle = b"" if isinstance(source, Path) else source, -1
        size = len(self._content)
        if isinstance(source, Path):
            self._handle = os.open(source, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._handle)
            size = os.fstat(self._handle).st_size
        self._count = size // _SIZE

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> NDArray[np.int32]:
        """``count`` numbers from ``start`` on; fewer where the file has been cut short."""
        at, size = start * _SIZE, count * _SIZE
        if self._handle < 0:
            content = bytes(self._content[at : at + size])
        elif hasattr(os, "pread"):
            content = os.pread(self._handle, size, at)
        else:  # pragma: no cover: Windows
            os.lseek(self._handle, at, os.SEEK_SET)
            content = os.read(self._handle, size)
        return np.frombuffer(content[: len(content) // _SIZE * _SIZE], "<i4")


class Shelf(Numbers):
    """Several ``Numbers`` one behind the other. What is read lies within one of them."""

    def __init__(self, each: Sequence[Numbers]) -> None:
        self._each, self._starts = list(each), [0, *accumulate(map(len, each))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> NDArray[np.int32]:
        """As ``Numbers.read``."""
        at = min(bisect_right(self._starts, start), len(self._each)) - 1
        return self._each[at].read(start - self._starts[at], count)
