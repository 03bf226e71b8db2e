"""Cases of lesson 2. What is wanted is what ``LoRALinear`` does, and autograd through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.graders.twin import twin
from minilora.learn.shown import difference

__all__ = ["EXERCISES"]


def _inputs() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """``(x, W, A, B, lora_alpha)``, small ones first; alpha is not r, and no side equals another."""
    row, column = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    yield row, torch.zeros(3, 2), torch.tensor([[1.0, 0.0]]), column, 2.0
    yield row, torch.zeros(3, 2), torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 6.0
    for seed, (tokens, in_features, out_features, r, lora_alpha) in enumerate([(3, 5, 4, 2, 3.0), (7, 6, 9, 4, 16.0)]):
        shapes = (tokens, in_features), (out_features, in_features), (r, in_features), (out_features, r)
        x, W, A, B = drawn(seed, *shapes)
        yield x, W, A, B, lora_alpha


def _start() -> Iterator[Case]:
    for sizes in [(3, 2, 1), (6, 4, 3), (64, 48, 8)]:
        yield Case(sizes, law=_begins)


def _begins(got: Any, in_features: int, out_features: int, r: int) -> str | None:
    """B is zero; A gives every row of B a gradient of its own."""
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got a {type(got).__name__}; wanted a tuple (A, B)"
    A, B = got
    if found := difference(torch.zeros_like(A), torch.zeros(r, in_features)):
        return f"A: {found}"
    if found := difference(B, torch.zeros(out_features, r)):
        return f"B: {found}"
    rank = int(torch.linalg.matrix_rank(A.double())) if bool(A.isfinite().all()) else 0
    if rank < min(r, in_features):
        return f"A has rank {rank}, wanted {min(r, in_features)}: its rows must differ, or the columns of B stay alike for ever"
    return None


def _forward() -> Iterator[Case]:
    for x, W, A, B, lora_alpha in _inputs():
        yield Case((x, W, A, B, lora_alpha), twin(W, A, B, lora_alpha)(x))


def _delta_weight() -> Iterator[Case]:
    for _, W, A, B, lora_alpha in _inputs():
        yield Case((A, B, lora_alpha), twin(W, A, B, lora_alpha).delta_weight())


def _gradients() -> Iterator[Case]:
    for x, W, A, B, lora_alpha in _inputs():
        layer = twin(W, A, B, lora_alpha, trains=True)
        g = drawn(len(W), (len(x), len(W)))[0] if len(x) > 1 else torch.ones(1, len(W))
        layer(x).backward(g)
        yield Case((x, g, A, B, lora_alpha), (layer.lora_A.grad, layer.lora_B.grad))


EXERCISES = (
    Exercise("start", _start),
    Exercise("forward", _forward),
    Exercise("delta_weight", _delta_weight),
    Exercise("gradients", _gradients),
)
