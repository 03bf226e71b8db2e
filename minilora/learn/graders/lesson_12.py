"""Cases of lesson 12. What is wanted is what ``lora/update.py``, ``lab/measures/spectra.py`` and ``many/intruders.py`` say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from minilora.lab.measures.spectra import effective_rank
from minilora.learn.case import Case, Exercise, Raises, drawn
from minilora.learn.graders.twin import twin
from minilora.lora.update import spectrum
from minilora.many.intruders import closest_directions

__all__ = ["EXERCISES"]

_LARGE = 1_000_000  # [out, in] of so many would be 4 TB
_NAN, _INF = math.nan, math.inf


def _spectrum() -> Iterator[Case]:
    A, B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    yield Case((A, B, 1.0), spectrum(twin(torch.zeros(2, 3), A, B, 2.0)))
    yield Case((A, B, 0.5), spectrum(twin(torch.zeros(2, 3), A, B, 1.0)))
    for seed, (in_features, out_features, r) in enumerate([(7, 5, 2), (3, 6, 3), (4, 3, 5)]):
        A, B = drawn(seed, (r, in_features), (out_features, r))
        layer = twin(torch.zeros(out_features, in_features), A, B, 3.0)
        yield Case((A, B, 3.0 / r), spectrum(layer), close=1e-5)
    ones = torch.ones(1, _LARGE)
    yield Case((ones, ones.T, 2.0), torch.tensor([2.0 * _LARGE]), said=f"in = out = {_LARGE:,}, r = 1, scaling=2")


def _effective_rank() -> Iterator[Case]:
    for values in ([1.0, 1.0], [5.0], [2.0, 2.0, 2.0, 0.0], [3.0, 1.0], [0.0, 0.0], [9.0, 4.0, 1.0, 0.5, 0.1, 1e-4]):
        yield Case((torch.tensor(values),), effective_rank(torch.tensor(values)), close=1e-4)


def _newness() -> Iterator[Case]:
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))[:, :3].contiguous()
    new = torch.zeros(4, 3)
    new[3, 0] = 50.0
    for delta, top_k in ((torch.zeros(4, 3), 2), (new, 2), (-4 * W, 3)):
        yield Case((W, delta, top_k), closest_directions(W, delta, top_k)[3], close=1e-4)
    for seed, (out_features, in_features, r, top_k) in enumerate([(9, 6, 1, 3), (12, 12, 2, 4)]):
        W, A, B = drawn(seed, (out_features, in_features), (r, in_features), (out_features, r))
        yield Case((W, 3 * B @ A, top_k), closest_directions(W, 3 * B @ A, top_k)[3], close=1e-3)


def _best_rate() -> Iterator[Case]:
    yield Case(({1e-3: [2.0], 1e-2: [1.0]},), 1e-2)
    yield Case(({1e-3: [2.0, 2.0], 1e-2: [1.0, 4.0]},), 1e-3)
    yield Case(({1e-2: [1.0, 1.0, 4.0], 1e-3: [1.5, 1.5, 1.5]},), 1e-3)
    yield Case(({1e-3: [2.0, 2.0], 1e-2: [1.0, _NAN]},), 1e-3)
    yield Case(({1e-2: [_NAN, 1.0], 1e-3: [2.0, 2.0], 1e-4: [3.0, 1.0]},), 1e-4)
    yield Case(({1e-2: [-_INF, 1.0], 1e-3: [2.0, 2.0]},), 1e-3)
    yield Case(({1e-2: [1.0, 3.0], 1e-3: [2.0, 2.0]},), 1e-3)
    yield Case(({1e-2: [_NAN], 1e-3: [_INF]},), Raises(ValueError))


EXERCISES = (
    Exercise("spectrum", _spectrum),
    Exercise("effective_rank", _effective_rank),
    Exercise("newness", _newness),
    Exercise("best_rate", _best_rate),
)
