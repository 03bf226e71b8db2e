"""Cases of lesson 1. The laws are those of the singular value decomposition, in fp64; factors as ``many/combine.py`` makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.shown import difference, kind_of

__all__ = ["EXERCISES"]

_TALL = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
_LINE = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])


def _best(W: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return ((U[:, :r] * S[:r]) @ Vh[:r]).float()


def _inputs() -> Iterator[tuple[Tensor, int]]:
    """Small ones first."""
    yield _TALL, 1
    yield _LINE, 1
    yield _TALL, 2
    for seed, (out_features, in_features, r) in enumerate([(5, 7, 2), (9, 4, 3), (6, 6, 6)]):
        yield drawn(seed, (out_features, in_features))[0], r


def _best_of_rank() -> Iterator[Case]:
    for W, r in _inputs():
        yield Case((W, r), _best(W, r))


def _factors() -> Iterator[Case]:
    for W, r in _inputs():
        yield Case((W, r), law=_thin)


def _thin(got: Any, W: Tensor, r: int) -> str | None:
    """Two factors of the right shapes, whose product is the best matrix, and rows of A of length 1."""
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got {kind_of(got)}; wanted a tuple (A, B)"
    A, B = got
    for name, factor, shape in (("A", A, (r, W.shape[1])), ("B", B, (len(W), r))):
        if found := difference(torch.empty_like(factor), torch.empty(shape)) if factor.shape != shape else None:
            return f"{name}: {found}"
    if found := difference(B @ A, _best(W, r), 1e-5):
        return f"B A: {found}"
    lengths = difference(A.norm(dim=1), torch.ones(r), 1e-5)
    return f"lengths of the rows of A: {lengths}" if lengths else None


def _captured() -> Iterator[Case]:
    yield Case((_TALL, 1), 16 / 25)
    yield Case((_LINE, 1), 1.0)
    for W, r in list(_inputs())[3:]:
        yield Case((W, r), float(_best(W, r).double().square().sum() / W.double().square().sum()))


def _numbers_saved() -> Iterator[Case]:
    for out_features, in_features, r in [(6, 4, 1), (4, 4, 3), (4096, 1024, 8)]:
        yield Case((out_features, in_features, r), out_features * in_features - r * out_features - r * in_features)


EXERCISES = (
    Exercise("best_of_rank", _best_of_rank),
    Exercise("factors", _factors),
    Exercise("captured", _captured),
    Exercise("numbers_saved", _numbers_saved),
)
