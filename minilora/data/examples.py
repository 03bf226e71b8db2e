"""A set of examples as tables of numbers: a Sequence of ``Encoded`` that makes each example when it is asked for.

A token takes four bytes, in memory or in a file of which the process holds nothing (``data/store.py``). A token that is learnt stands
as its id, one that is not as the complement ``~id``, which is below zero; so one number is id and label. What is asked of all examples
before the first step (their lengths, their largest id, their digests) stands in a table of its own, so no token is read for it.
Next file: ``data/store.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from minilora.data.encoding import Encoded
from minilora.data.numbers import Numbers
from minilora.data.places import Places
from minilora.data.tokens import IGNORED
from minilora.errors import DataError

__all__ = ["EXAMPLE", "Examples", "digest_of", "digests", "in_tokens", "row_of"]

_DIGEST = 16  # bytes
# A row for each example that has something to learn. ``largest`` is its largest id.
EXAMPLE = np.dtype(
    [
        ("length", "<i4"),
        ("supervised", "<i4"),
        ("largest", "<i4"),
        ("record", "<i4"),
        ("truncated", "u1"),
        ("digest", "u1", (_DIGEST,)),
    ]
)


def digest_of(example: Encoded) -> bytes:
    """16 bytes that are others for an example with another token or label: the first half of a SHA-256."""
    return _digest(np.array([example.input_ids, example.labels], dtype="<i8"))


def digests(examples: Sequence[Encoded]) -> Iterable[bytes]:
    """``digest_of`` of all one after the other, in pieces; from the table, where there is one."""
    return (
        [examples.table["digest"][examples.chosen].tobytes()]
        if isinstance(examples, Examples)
        else map(digest_of, examples)
    )


def _digest(ids_and_labels: NDArray[np.int64]) -> bytes:
    return hashlib.sha256(ids_and_labels.tobytes()).digest()[:_DIGEST]


def row_of(example: Encoded, record: int) -> tuple[Any, ...]:
    """The row of ``EXAMPLE``; ``record`` is the number of the record that it was made of."""
    largest, digest = max(example.input_ids), np.frombuffer(digest_of(example), np.uint8)
    return len(example.input_ids), example.supervised, largest, record, example.truncated, digest


def in_tokens(example: Encoded) -> NDArray[np.int32]:
    """The tokens as they are kept. Raises ``DataError`` for ids or labels that cannot be kept so."""
    ids, labels = np.array([example.input_ids, example.labels], dtype=np.int64)
    learnt = labels != IGNORED
    if ids.min() < 0 or ids.max() >= 2**31 or not np.array_equal(ids[learnt], labels[learnt]):
        raise DataError(f"{example.where}: has an id below 0 or above 2**31, or a label that is another token's")
    return np.where(learnt, ids, ~ids).astype("<i4")


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Encoded]):
    """Some examples of a table.

    Attributes:
        tokens: int32, of all examples one after the other. table: ``EXAMPLE``, a row each. starts: int64, where each one's tokens begin.
        chosen: the numbers of the examples of this set, in its order; one may come several times. places: where each record stands.
    """

    tokens: Numbers
    table: NDArray[np.void]
    starts: NDArray[np.int64]
    chosen: NDArray[np.int32]
    places: Places

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...

    @overload
    def __getitem__(self, at: slice) -> Examples: ...

    def __getitem__(self, at: int | slice) -> Encoded | Examples:
        """An example, or some of them as a set. Raises ``DataError`` for one whose tokens are damaged."""
        if isinstance(at, slice):
            return replace(self, chosen=self.chosen[at])
        number = int(self.chosen[at])
        row = self.table[number]
        where = self.places.where(int(row["record"]))
        kept = self.tokens.read(int(self.starts[number]), int(row["length"])).astype("<i8")
        both = np.stack([np.where(kept < 0, ~kept, kept), np.where(kept < 0, IGNORED, kept)])
        if _digest(both) != row["digest"].tobytes():
            place = self.places.store(int(row["record"]))
            raise DataError(
                f"{place}: damaged in the tokens of {where}; remove the folder, and the next run makes it anew"
            )
        ids, labels = map(tuple, both.tolist())
        return Encoded(ids, labels, bool(row["truncated"]), where)

    @property
    def rows(self) -> NDArray[np.void]:
        """The rows of these examples, ``EXAMPLE``."""
        return self.table[self.chosen]

    def suspects(self, context: int | None, rows: int | None) -> Iterator[tuple[int, Encoded]]:
        """``(place from 1, example)`` of those that a model of this context and this embedding cannot take, by the table."""
        table = self.rows
        bad = table["supervised"] == 0
        if context is not None:
            bad |= table["length"] > context
        if rows is not None:
            bad |= table["largest"] >= rows
        return ((int(at) + 1, self[int(at)]) for at in np.flatnonzero(bad))
