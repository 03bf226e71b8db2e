"""Cases of lesson 7. Gradients are those of ``lora_linear``, and what is kept is counted in what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.shown import difference
from minilora.linear.fused import lora_linear
from minilora.quant.blockwise import quantize

__all__ = ["EXERCISES"]


def _gradient_of_x() -> Iterator[Case]:
    one, row = torch.ones(1, 1), torch.tensor([[1.0, 2.0]])
    yield Case((one, row, torch.zeros(1, 2), one, 3.0), row)
    yield Case((one, torch.zeros(1, 2), row, torch.tensor([[2.0]]), 3.0), 6 * row)
    for seed, (tokens, in_features, out_features, r, scaling) in enumerate([(3, 5, 4, 2, 0.5), (6, 7, 9, 3, 2.0)]):
        shapes = (tokens, out_features), (out_features, in_features), (r, in_features), (out_features, r)
        g, W, A, B = drawn(seed, *shapes)
        x = torch.zeros(tokens, in_features, requires_grad=True)
        lora_linear(x, W, None, A, B, scaling).backward(g)
        yield Case((g, W, A, B, scaling), x.grad)


class _Decoder:
    """Returns a fresh dense weight; knows how often, and whether one is still held by somebody."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.given: list[StorageWeakRef] = []

    def __call__(self) -> Tensor:
        fresh = self.weight.clone()
        self.given.append(StorageWeakRef(fresh.untyped_storage()))
        return fresh


def _frozen_linear() -> Iterator[Case]:
    for seed, (tokens, in_features, out_features) in enumerate([(1, 2, 3), (5, 8, 6), (3, 40, 70)]):
        x, W = drawn(seed, (tokens, in_features), (out_features, in_features))
        said = f"x={list(x.shape)}, decode gives W {list(W.shape)}"
        yield Case((x.requires_grad_(), _Decoder(W)), law=_keeps_nothing, said=said)


def _keeps_nothing(got: Any, x: Tensor, decode: _Decoder) -> str | None:
    """The product and the gradient are right, and no dense weight lives between the two passes."""
    if found := difference(got, (x @ decode.weight.T).detach(), 1e-5):
        return found
    if not got.requires_grad:
        return "got an output that wants no gradient, so none would reach the layers before; wanted one that does"
    before = len(decode.given)
    if any(not each.expired() for each in decode.given):
        return f"a dense weight {list(decode.weight.shape)} is still held when the forward pass is over; wanted none"
    g = torch.linspace(-1, 1, got.numel()).view_as(got)
    got.backward(g)
    if len(decode.given) == before:
        return "decode() is not called in the backward pass, so a copy of the weight was kept; wanted none"
    return f"gradient of x: {found}" if (found := difference(x.grad, g @ decode.weight, 1e-5)) else None


def _kept_bytes() -> Iterator[Case]:
    for tokens, in_features, out_features, r, itemsize in [(1, 64, 32, 2, 4), (10, 64, 96, 4, 2), (7, 32, 64, 8, 4)]:
        kept = _kept(tokens, in_features, out_features, r)
        yield Case((tokens, in_features, out_features, r, itemsize), kept * itemsize)


def _kept(tokens: int, in_features: int, out_features: int, r: int) -> int:
    """How many numbers ``lora_linear`` keeps beside weights, which are there anyway."""
    x, W, A, B = drawn(0, (tokens, in_features), (out_features, in_features), (r, in_features), (out_features, r))
    packed = quantize(W)
    for part in (x, A, B):
        part.requires_grad_()
    known = {part.data_ptr() for part in (A, B, packed.packed, packed.absmax)}
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):  # type: ignore[func-returns-value]
        lora_linear(x, packed, None, A, B, 2.0)
    return sum(part.numel() for part in kept if part.data_ptr() not in known)


EXERCISES = (
    Exercise("gradient_of_x", _gradient_of_x),
    Exercise("frozen_linear", _frozen_linear),
    Exercise("kept_bytes", _kept_bytes),
)
