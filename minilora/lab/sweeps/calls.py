"""The calls of a sweep: which trials share one, the gradients of a step, and an evaluation.

Trials share a call as far as their rows are about equally long and its tokens fit. Next file: ``lab/sweeps/sweeping.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from minilora.data.encoding import Encoded
from minilora.lab.sweeps.going import Going
from minilora.lab.sweeps.together import Ask, drawing_from
from minilora.training.losses import token_losses

__all__ = ["Caller", "Ones", "assess", "step"]

_PADDING = 1.1  # times as many tokens as the trials have, at most, are computed for a call that they share


class Caller(Protocol):
    """What computes losses: a staged model, or ``Ones``."""

    model: nn.Module

    def calling(self, asks: Sequence[Ask]) -> AbstractContextManager[list[Tensor]]:
        """As ``Stage.calling``."""


class Ones:
    """A model with one trial in it, which is active."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def calling(self, asks: Sequence[Ask]) -> Iterator[list[Tensor]]:
        (ask,) = asks
        with drawing_from(ask.stream):
            yield [token_losses(self.model, dict(ask.batch))]


def step(caller: Caller, ready: Sequence[Going], pad_id: int, room: int) -> None:
    """One step of each of these trials."""
    batches = [going.batches() for going in ready]
    supervised = [sum(example.supervised for batch in own for example in batch) for own in batches]
    losses: list[list[float]] = [[] for _ in ready]
    for going in ready:
        going.train(True)
    for number in range(max(len(own) for own in batches)):
        asks = {}
        for at, going in enumerate(ready):
            if number < len(batches[at]):
                going.seed(number)
                asks[at] = Ask(going.result.name, going.tensors(batches[at][number], pad_id), going.stream)
        for group in _groups(asks, room):
            begun = time.monotonic()
            with caller.calling([asks[at] for at in group]) as found:
                own = [loss.sum() / supervised[at] for at, loss in zip(group, found, strict=True)]
                total = torch.stack(own).sum()
                if total.requires_grad:
                    total.backward()
            for at, loss in zip(group, torch.stack(own).tolist(), strict=True):
                losses[at].append(loss)
            _share_out(time.monotonic() - begun, [ready[at] for at in group], [asks[at] for at in group])
    for going, of_it in zip(ready, losses, strict=True):
        begun = time.monotonic()
        going.advance(of_it)
        going.result.seconds += time.monotonic() - begun


@torch.no_grad()
def assess(caller: Caller, due: Sequence[Going], evaluation: Sequence[Encoded], pad_id: int, room: int) -> None:
    """An evaluation of each of these trials, as ``losses.evaluate``: the mean loss of a supervised token."""
    sizes = [going.config.batch_size for going in due]
    sums, counts = [0.0] * len(due), [0] * len(due)
    for going in due:
        going.train(False)
    for number in range(max(-(-len(evaluation) // size) for size in sizes)):
        asks = {}
        for at, (going, size) in enumerate(zip(due, sizes, strict=True)):
            if batch := evaluation[number * size : (number + 1) * size]:
                asks[at] = Ask(going.result.name, going.tensors(batch, pad_id), going.stream)
        for group in _groups(asks, room):
            with caller.calling([asks[at] for at in group]) as found:
                for at, loss in zip(group, found, strict=True):
                    sums[at] += loss.double().sum().item()
                    counts[at] += len(loss)
    for going, total, count in zip(due, sums, counts, strict=True):
        going.assessed(total / count)


def _groups(asks: dict[int, Ask], room: int) -> Iterator[list[int]]:
    """Which asks share a call, the longest first: rows of one kind, little padding, at most ``room`` tokens unless one has more."""
    left = sorted(asks, key=lambda at: (sorted(asks[at].batch), -asks[at].size[1]))
    while left:
        group, kind, length = [left[0]], asks[left[0]].batch.keys(), asks[left[0]].size[1]
        rows, own = asks[left[0]].size[0], asks[left[0]].size[0] * length
        for at in left[1:]:
            count, width = asks[at].size
            tokens = (rows + count) * length
            if asks[at].batch.keys() == kind and tokens <= room and tokens <= _PADDING * (own + count * width):
                group.append(at)
                rows, own = rows + count, own + count * width
        left = [at for at in left if at not in group]
        yield sorted(group)


def _share_out(seconds: float, group: Sequence[Going], asks: Sequence[Ask]) -> None:
    """The time of a call to the trials that shared it, by their tokens."""
    tokens = [rows * width for rows, width in (ask.size for ask in asks)]
    for going, own in zip(group, tokens, strict=True):
        going.result.seconds += seconds * own / sum(tokens)
