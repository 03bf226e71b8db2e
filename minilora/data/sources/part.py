"""What was looked at: the parts of a source, each with its hash, and how its rows are read again.

Next file: ``data/sources/foreign.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Part", "Rows", "Source", "hash_of"]

Rows = Iterator[tuple[int, Any]]  # the line (or row, from 1) that each value stands in, and the value


@dataclass(frozen=True)
class Part:
    """A file, or a split of a data set, as it was when it was looked at.

    Attributes:
        name: for messages. kind: "JSONL", "JSON", "CSV", "TSV", "Parquet", "Arrow", "text", "data set".
        size: in bytes. sha256: of its bytes. records: rows that are not blank.
        rows: reads them again. Raises ``DataError`` for what cannot be read, and where the file is another one by now.
    """

    name: str
    kind: str
    size: int
    sha256: str
    records: int
    rows: Callable[[], Rows]


@dataclass(frozen=True)
class Source:
    """An entry of the data: its name, its parts, and how often its examples count."""

    name: str
    parts: Sequence[Part]
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def records(self) -> int:
        """Records of all parts."""
        return sum(part.records for part in self.parts)

    @property
    def sha256(self) -> str:
        """Of one file its own; of several, of theirs in their order."""
        return self.parts[0].sha256 if len(self.parts) == 1 else hash_of(part.sha256 for part in self.parts)

    @property
    def kinds(self) -> list[str]:
        """The formats of its parts, each once: the same bytes as text are other records than as JSONL."""
        return sorted({part.kind for part in self.parts})


def hash_of(texts: Iterable[str]) -> str:
    """SHA-256 of texts one after the other."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
