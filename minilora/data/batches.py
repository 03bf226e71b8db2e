"""Training data: records in batches. Which examples a step sees is a function of (seed, step), so it can be found again at any step.

Everything is read, checked and encoded before training, and no worker process draws anything. Next file: ``data/packing.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from minilora.data.encoding import IGNORED, Encoded

T = TypeVar("T")
__all__ = ["Collate", "collate", "micro_batches", "split"]

Collate = Callable[[Sequence[Encoded], int], dict[str, Tensor]]  # a batch and the padding token to tensors


def split(records: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """``(training, evaluation)``: a random ``share`` in [0, 1) of the records, at least one if ``share`` > 0, is held out."""
    held = min(len(records) - 1, max(1, round(share * len(records)))) if share > 0 else 0
    order = torch.randperm(len(records), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
    return [records[i] for i in sorted(order[held:])], [records[i] for i in sorted(order[:held])]


def micro_batches(examples: Sequence[Encoded], batch_size: int, seed: int, start: int = 0) -> Iterator[list[Encoded]]:
    """Batches of exactly ``batch_size`` without end: one epoch after the other, each in its own order, cut wherever a batch is full.

    So every example comes once an epoch, and none is dropped; a batch over the end of an epoch takes the rest from the next one, and
    one larger than the set holds some examples more than once. ``start`` skips as many batches without drawing them.
    """
    count, at = len(examples), start * batch_size
    epoch, order = -1, torch.empty(0)
    while True:
        batch = []
        for place in range(at, at + batch_size):
            if place // count != epoch:
                epoch = place // count
                order = _epoch_order(count, seed, epoch)
            batch.append(examples[int(order[place % count])])
        yield batch
        at += batch_size


def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator, device="cpu")


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``attention_mask``, int64 ``[batch, longest]``, padded on the right."""
    longest = max(len(example.input_ids) for example in batch)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in batch], pad_id),
        "labels": padded([example.labels for example in batch], IGNORED),
        "attention_mask": padded([[1] * len(example.input_ids) for example in batch], 0),
    }
