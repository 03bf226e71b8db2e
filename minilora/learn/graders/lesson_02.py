"""Cases of lesson 2. What is wanted is what ``LoRALinear`` does, and autograd through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.graders.twin import twin
from minilora.learn.shown import difference, kind_of

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
        yield Case(sizes, law=_begins, asks=_draws_anew)


def _begins(got: Any, in_features: int, out_features: int, r: int) -> str | None:
    """B is zero; A gives every row of B a gradient of its own."""
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got {kind_of(got)}; wanted a tuple (A, B)"
    A, B = got
    if found := difference(torch.zeros_like(A), torch.zeros(r, in_features)):
        return f"A: {found}"
    if found := difference(B, torch.zeros(out_features, r)):
        return f"B: {found}"
    if not A.isfinite().all():
        return "A has a value that is not finite"
    if not A.any():
        return "A is zero, so B gets no gradient; wanted rows that differ"
    rank = int(torch.linalg.matrix_rank(A.double()))
    if rank < min(r, in_features):
        return f"A has rank {rank}, wanted {min(r, in_features)}: its rows must differ, or the columns of B stay alike for ever"
    return None


def _draws_anew(function: Callable[..., Any], *sizes: int) -> str | None:
    same = difference(function(*sizes), function(*sizes)) is None
    return "two calls return the same A; wanted one that is drawn anew in every call" if same else None


def _forward() -> Iterator[Case]:
    for x, W, A, B, lora_alpha in _inputs():
        asks = (
            _forms_no_product if len(x) > 1 else None
        )  # a single row gives an output with as many numbers as other things
        yield Case((x, W, A, B, lora_alpha), twin(W, A, B, lora_alpha)(x), asks=asks)


def _forms_no_product(function: Callable[..., Any], x: Tensor, W: Tensor, *rest: Any) -> str | None:
    with _Sizes(W) as seen:
        function(x, W, *rest)
    return f"forms a matrix {list(W.shape)} beside W; wanted none of its size, as B A is" if seen.formed else None


class _Sizes(TorchDispatchMode):
    """Whether anything was computed that has the shape of W, or of its transpose, and does not come from W alone, as a cast does."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.shapes = (W.shape, W.T.shape)
        self.own = [W.untyped_storage()]  # kept, so that none of their places is used again
        self.formed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape[-2:] in self.shapes and not self._is_own(result):
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if given and all(map(self._is_own, given)):
                self.own.append(result.untyped_storage())
            else:
                self.formed = True
        return result

    def _is_own(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == each.data_ptr() for each in self.own)


def _delta_weight() -> Iterator[Case]:
    for _, W, A, B, lora_alpha in _inputs():
        yield Case((A, B, lora_alpha), twin(W, A, B, lora_alpha).delta_weight())


_GRADIENTS = ("the gradient of A", "the gradient of B")


def _gradients() -> Iterator[Case]:
    for x, W, A, B, lora_alpha in _inputs():
        layer = twin(W, A, B, lora_alpha, trains=True)
        g = drawn(len(W), (len(x), len(W)))[0] if len(x) > 1 else torch.ones(1, len(W))
        layer(x).backward(g)
        yield Case((x, g, A, B, lora_alpha), (layer.lora_A.grad, layer.lora_B.grad), parts=_GRADIENTS)


EXERCISES = (
    Exercise("start", _start),
    Exercise("forward", _forward),
    Exercise("delta_weight", _delta_weight),
    Exercise("gradients", _gradients),
)
