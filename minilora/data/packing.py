"""Packing: several examples in one row, one behind the other, so that little of a batch is padding.

A batch of examples of different lengths is padded to its longest one, and the model computes the padding too. Packed, the same examples
lie in fewer rows; each begins at position 0 again, and no 2-D attention mask is given, because from the positions alone a model can tell
where an example ends. Not every model does: ``training/packed.py`` looks before a run begins.

The examples of a micro-batch stay together, so packing changes neither which examples a step sees nor its loss, only the work that goes
into it. First fit decreasing (Johnson 1973): the longest example first, each into the first row with room for it.
Next file: ``training/chunked.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from minilora.data.batches import micro_batches
from minilora.data.encoding import IGNORED, Encoded

__all__ = [
    "MOST_PADDING",
    "Saving",
    "collate_one_row",
    "collate_packed",
    "collate_rows",
    "one_row",
    "pack",
    "saving",
    "with_longest_row",
]

MOST_PADDING = 0.02  # of the tokens that a packed batch computes
_LOOKED_AT = 256  # micro-batches from which the saving is told

Row = list[Encoded]


def pack(batch: Sequence[Encoded]) -> list[Row]:
    """The examples of a batch in rows of which, padded to the longest row, at most ``MOST_PADDING`` is padding.

    Of all numbers of rows the largest that allows it, because attention costs the square of a row's length; a single row has no
    padding at all. The same batch gives the same rows.
    """
    ordered = sorted(batch, key=lambda example: -len(example.input_ids))  # those of one length stay in their order
    total = sum(len(example.input_ids) for example in ordered)
    for count in range(total // len(ordered[0].input_ids), 1, -1):
        rows = _first_fit(ordered, int(total / (1 - MOST_PADDING) / count))
        if _padding(rows) <= MOST_PADDING:
            return rows
    return [ordered]


def _first_fit(examples: Sequence[Encoded], length: int) -> list[Row]:
    """Each example in the first row that it leaves no longer than ``length``, in a new one where there is none."""
    rows: list[Row] = []
    room: list[int] = []
    for example in examples:
        size = len(example.input_ids)
        at = next((number for number, left in enumerate(room) if left >= size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(example)
        room[at] -= size
    return rows


def _tokens(rows: Sequence[Row]) -> int:
    """Tokens that are computed: each row is as long as the longest."""
    return len(rows) * max(sum(len(example.input_ids) for example in row) for row in rows)


def _padding(rows: Sequence[Row]) -> float:
    return 1 - sum(len(example.input_ids) for row in rows for example in row) / _tokens(rows)


def collate_packed(batch: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """The tensors of ``collate_rows`` for ``pack(batch)``."""
    return collate_rows(pack(batch), pad_id)


def one_row(batch: Sequence[Encoded]) -> list[Row]:
    """All examples of a batch in one row."""
    return [list(batch)]


def collate_one_row(batch: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """As ``collate_packed``, all in one row: attention kernels that compute no masked part (FlashAttention) want it so."""
    return collate_rows(one_row(batch), pad_id)


def collate_rows(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``position_ids``, int64 ``[rows, longest]``.

    The first token of an example is no label: nothing before it predicts it. Padding is one more example, without labels.
    """
    width = _tokens(rows) // len(rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        ids = [token for example in row for token in example.input_ids]
        labels = [label for example in row for label in (IGNORED, *example.labels[1:])]
        places = [place for example in row for place in range(len(example.input_ids))]
        short = width - len(ids)
        columns["input_ids"].append(ids + [pad_id] * short)
        columns["labels"].append(labels + [IGNORED] * short)
        columns["position_ids"].append(places + list(range(short)))
    return {name: torch.tensor(values) for name, values in columns.items()}


@dataclass(frozen=True)
class Saving:
    """What packing does to the micro-batches of a run.

    Attributes:
        padding: share of the computed tokens that is padding when each example has a row of its own, and ``packed``: when packed.
    """

    padding: float
    packed: float

    @property
    def times(self) -> float:
        """Computed tokens unpacked over those packed, at least about 1."""
        return (1 - self.packed) / (1 - self.padding)


def saving(examples: Sequence[Encoded], batch_size: int, seed: int) -> Saving:
    """What packing saves, told from the first epoch's micro-batches of a run (256 of them at most); nothing is drawn from torch."""
    batches = _first_batches(examples, batch_size, seed)
    real = sum(len(example.input_ids) for batch in batches for example in batch)
    apart, packed = (sum(map(_tokens, rows)) for rows in (map(_apart, batches), map(pack, batches)))
    return Saving(1 - real / apart, 1 - real / packed)


def with_longest_row(
    examples: Sequence[Encoded], batch_size: int, seed: int, rows: Callable[[Sequence[Encoded]], list[Row]]
) -> list[Row]:
    """Of the same micro-batches, the rows of the one that has the longest row."""
    every = map(rows, _first_batches(examples, batch_size, seed))
    return max(every, key=lambda rows: max(sum(len(example.input_ids) for example in row) for row in rows))


def _first_batches(examples: Sequence[Encoded], batch_size: int, seed: int) -> list[list[Encoded]]:
    count = min(_LOOKED_AT, -(-len(examples) // batch_size))
    return list(islice(micro_batches(examples, batch_size, seed), count))


def _apart(batch: Sequence[Encoded]) -> list[Row]:
    return [[example] for example in batch]
