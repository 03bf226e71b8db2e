"""Where records stand, for messages: their files and lines, in a table of numbers. Next file: ``data/examples.py``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Places"]


@dataclass(frozen=True, eq=False)
class Places:
    """The places of records.

    Attributes:
        lines: int64, the line of each record. names: the files that they stand in, one behind the other. ends: after the last record of
            each file. stores: the store of each file's tokens, None where they are in memory.
    """

    lines: NDArray[np.int64]
    names: Sequence[str]
    ends: Sequence[int]
    stores: Sequence[Path | None]

    def where(self, record: int) -> str:
        """File and line of a record."""
        return f"{self.names[self._file(record)]}:{self.lines[record]}"

    def store(self, record: int) -> Path | None:
        """The store that a record's tokens lie in."""
        return self.stores[self._file(record)]

    def _file(self, record: int) -> int:
        return min(bisect_right(self.ends, record), len(self.names) - 1)

    @classmethod
    def together(cls, each: Sequence[Places]) -> Places:
        """The places of several one behind the other."""
        begins = [0, *accumulate(len(one.lines) for one in each)]
        ends = [begin + end for begin, one in zip(begins, each, strict=False) for end in one.ends]
        names, stores = [name for one in each for name in one.names], [store for one in each for store in one.stores]
        return cls(np.concatenate([one.lines for one in each]), names, ends, stores)
