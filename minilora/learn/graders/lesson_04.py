"""Cases of lesson 4. What is wanted is what ``data/tokens.py``, ``data/batches.py`` and ``training/losses.py`` make of the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED, _labels
from minilora.learn.case import Case, Exercise, drawn
from minilora.training.losses import token_losses

__all__ = ["EXERCISES"]


def _label_cases() -> Iterator[Case]:
    for places, spans in [
        ([(0, 2), (2, 4)], [(2, 4)]),
        ([(0, 2), (2, 4), (4, 6)], [(0, 2)]),
        ([(0, 3), (3, 5)], [(2, 5)]),
        ([(0, 3), (3, 5), (5, 9)], [(3, 6)]),
        ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(1, 2), (3, 5)]),
        ([(0, 2), (2, 3)], []),
    ]:
        ids = list(range(11, 11 + len(places)))
        yield Case((ids, places, spans), _labels(ids, places, spans))
    draw = random.Random(4)
    for _ in range(5):
        borders = sorted(draw.sample(range(1, 60), 15))
        places = list(zip([0, *borders], [*borders, 60], strict=True))
        cuts = sorted(draw.sample(range(60), 4))
        spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        ids = [draw.randrange(1000) for _ in places]
        yield Case((ids, places, spans), _labels(ids, places, spans))


class _Said(nn.Module):
    """A model that says the logits that it was given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    ids = labels.clamp(min=0)
    with torch.no_grad():
        return token_losses(_Said(logits), {"input_ids": ids, "labels": labels}).mean()


def _losses() -> Iterator[Case]:
    sure = torch.tensor([[[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    for logits, labels in [
        (sure, torch.tensor([[IGNORED, 0, IGNORED]])),
        (sure, torch.tensor([[1, IGNORED, 1]])),
        (sure, torch.tensor([[IGNORED, 1, 1]])),
        (torch.cat([sure, sure]), torch.tensor([[IGNORED, 1, 1], [IGNORED, IGNORED, 0]])),
    ]:
        yield Case((logits, labels), _mean(logits, labels), said=f"logits={_list(logits)}, labels={labels.tolist()}")
    for seed in range(2):
        (logits,) = drawn(seed, (3, 8, 11))
        labels = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(seed))
        labels[0, :5] = labels[1, 2:] = IGNORED
        yield Case((logits, labels), _mean(logits, labels))


def _list(values: Tensor) -> str:
    return str(values.int().tolist())


def _batches() -> Iterator[Case]:
    for ids, labels, pad_id in [
        ([[5, 6, 7], [8]], [[IGNORED, 6, 7], [8]], 0),
        ([[5], [8, 9]], [[5], [IGNORED, 9]], 3),
        ([[1, 2]], [[IGNORED, 2]], 0),
        ([[4, 4, 4, 4], [4, 4], [4]], [[4, 4, 4, 4], [4, 4], [4]], 4),
    ]:
        examples = [Encoded(tuple(row), tuple(some)) for row, some in zip(ids, labels, strict=True)]
        yield Case((ids, labels, pad_id), collate(examples, pad_id))


EXERCISES = (Exercise("labels", _label_cases), Exercise("loss", _losses), Exercise("padded", _batches))
