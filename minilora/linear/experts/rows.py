"""A chunk of sorted rows through one projection, forward and backward: the frozen matrices and the low-rank parts together.

    forward    h = s x' A^T              y = x W^T + h B^T                  x' = x, or x under the mask of dropout
    backward   gh = s g B    gB = g^T h    gA = gh^T x'    gx = g W + gh A    (gh A under the mask)

for each expert that has rows in it. These are the only products with experts; ``grouped.py`` and ``whole.py`` call them. Results are
written where they belong, and what is needed between two lines lies in buffers that are reused. Next file: ``linear/experts/grouped.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from minilora.linear import cuda, fused
from minilora.linear.fused import Weight, keep_masks, made_up, new_seed, parts_dropped
from minilora.linear.ops import buffer, matmul, on_paper_matmul
from minilora.quant.stack import QuantizedStack

__all__ = [
    "Factors",
    "Matrices",
    "Span",
    "Stack",
    "backward_rows",
    "forward_rows",
    "one_expert",
    "rebuilt",
    "tensors_of",
]

Stack = Tensor | QuantizedStack


@dataclass(frozen=True)
class Factors:
    """What multiplies the low-rank part, apart from its tensors.

    Attributes:
        scaling: makes up for what dropout takes. drop: inputs dropped, in parts of 1/65536. seed: of the mask; that of a chunk that
            begins with row ``first`` is drawn from ``seed + first``.
    """

    scaling: float
    drop: int = 0
    seed: int = 0

    @classmethod
    def of(cls, scaling: float, p: float) -> Factors:
        """A new seed is drawn where ``p`` is not 0."""
        drop = parts_dropped(p)
        return cls(made_up(scaling, drop), drop, new_seed(drop))


class Span(NamedTuple):
    """Rows ``first`` to ``last`` of a chunk belong to ``expert``; ``again``: it had rows in a chunk before."""

    expert: int
    first: int
    last: int
    again: bool = False


class Matrices:
    """One projection for one pass: every expert's own matrices, as views that are made at once.

    Args:
        weight: ``[E, out, in]``. A: ``[E, r, in]`` and B: ``[E, out, r]``, or None for both.
        experts: those with rows. dtype: of the products.
        ends: ``[E]`` int32, where each expert's rows end, if a pass is one chunk: the grouped kernels may take it then.
    """

    def __init__(self, weight: Stack, A: Tensor | None, B: Tensor | None, factors: Factors, experts: Sequence[int],
                 dtype: torch.dtype, ends: Tensor | None = None) -> None:  # fmt: skip
        self.factors, self.dtype, self.stack, self.ends, self.pair = factors, dtype, weight, ends, (A, B)
        self.out_features, self.in_features = weight.shape[1:]
        self.r = 0 if A is None else A.shape[1]
        self.weight = _each(weight, experts) if isinstance(weight, Tensor) and weight.dtype == dtype else None
        self.A, self.B = ({} if part is None else _each(part, experts, dtype) for part in (A, B))

    def products(self, x: Tensor, spans: Sequence[Span], into: Tensor, h: Tensor | None, forward: bool) -> None:
        """``x W^T + h B^T`` (``forward``), or ``x W + h A``, into ``into``: by the kernels in one launch, or expert by expert."""
        stored = self.stack.stored if isinstance(self.stack, QuantizedStack) and self.stack.is_whole else None
        if self.ends is not None and stored is not None and cuda.grouped_available(stored, x):
            pair = None if h is None else self.pair[1 if forward else 0]
            into.copy_(cuda.grouped(x, stored, self.ends, forward, h, pair, into.dtype))
            return
        thin, sizes = self.B if forward else self.A, [span.last - span.first for span in spans]
        lows: Sequence[Tensor | None] = [None] * len(spans) if h is None else h.split(sizes)
        for part, span, out, low in zip(x.split(sizes), spans, into.split(sizes), lows, strict=True):
            own = None if low is None else thin[span.expert]
            if isinstance(part, FakeTensor) and isinstance(self.stack, QuantizedStack):
                out.copy_(on_paper_matmul(part, self.stack.one(span.expert), forward))
            elif self.weight is None or out.dtype != self.dtype:
                out.copy_(matmul(part, one_expert(self.stack, span.expert), forward, low, own, None, out.dtype))
                continue
            else:
                weight = self.weight[span.expert]
                torch.mm(part, weight.t() if forward else weight, out=out)
            if low is not None and own is not None:
                out.addmm_(low, own.t() if forward else own)


def one_expert(weight: Stack, expert: int) -> Weight:
    """One expert's matrix, ``[out, in]``, dense or packed as the stack is."""
    return weight.one(expert) if isinstance(weight, QuantizedStack) else weight[expert]


def _each(stack: Tensor, experts: Sequence[int], dtype: torch.dtype | None = None) -> dict[int, Tensor]:
    """The matrices of these experts. All of a stack at once are made faster than one by one, unless few are wanted."""
    wanted = stack.dtype if dtype is None else dtype
    if 2 * len(experts) < len(stack):
        return {expert: stack[expert].to(wanted) for expert in experts}
    own = stack.to(wanted).unbind()
    return {expert: own[expert] for expert in experts}


def forward_rows(of: Matrices, spans: Sequence[Span], x: Tensor, first: int, h: Tensor | None, out: Tensor) -> None:
    """``out [m, out]`` and ``h [m, r]`` (None without factors) of a chunk ``x [m, in]``, which lies in the products' dtype.

    ``first``: the number of the chunk's first row, of which its mask is drawn.
    """
    sizes = [span.last - span.first for span in spans]
    if h is None:
        of.products(x, spans, out, None, True)
        return
    low = h.split(sizes)
    for part, span, into in zip(_dropped(x, of.factors, first).split(sizes), spans, low, strict=True):
        torch.mm(part, of.A[span.expert].t(), out=into)
    h.mul_(of.factors.scaling)
    of.products(x, spans, out, h, True)


def backward_rows(of: Matrices, spans: Sequence[Span], g: Tensor, x: Tensor | None, first: int, h: Tensor | None,
                  grad_A: Tensor | None, grad_B: Tensor | None, out: Tensor | None) -> None:  # fmt: skip
    """Of a chunk ``g [m, out]`` in the products' dtype: what is not None of ``out [m, in]``, and the gradients of the factors of its
    experts, ``grad_A[e] [r, in]`` and ``grad_B[e] [out, r]``, which are added to what is there for an expert that had rows before.
    """
    sizes = [span.last - span.first for span in spans]
    parts, gh = g.split(sizes), None
    if grad_B is not None and h is not None:
        _outer(g.t().split(sizes, 1), h.split(sizes), spans, grad_B)
    if of.r and (grad_A is not None or out is not None):
        gh = buffer("gh", (len(g), of.r), g.device, of.dtype)
        for part, span, into in zip(parts, spans, gh.split(sizes), strict=True):
            torch.mm(part, of.B[span.expert], out=into)
        gh.mul_(of.factors.scaling)
    if grad_A is not None and x is not None and gh is not None:
        _outer(gh.t().split(sizes, 1), _dropped(x, of.factors, first).split(sizes), spans, grad_A)
    if out is None:
        return
    if gh is None or not of.factors.drop:
        of.products(g, spans, out, gh, False)
        return
    of.products(g, spans, out, None, False)
    through = buffer("through", out.shape, g.device, of.dtype)
    for part, span, into in zip(gh.split(sizes), spans, through.split(sizes), strict=True):
        torch.mm(part, of.A[span.expert], out=into)
    out += _dropped(through, of.factors, first)


def _outer(left: Sequence[Tensor], right: Sequence[Tensor], spans: Sequence[Span], grads: Tensor) -> None:
    """``left[i] right[i]`` into the gradient of each expert's factor, or added to it."""
    for one, other, span in zip(left, right, spans, strict=True):
        if span.again:
            grads[span.expert].addmm_(one, other)
        else:
            torch.mm(one, other, out=grads[span.expert])


def _dropped(x: Tensor, own: Factors, first: int) -> Tensor:
    """``x`` with the mask of its rows on it; ``x`` itself without dropout."""
    if not own.drop:
        return x
    out = buffer("dropped", x.shape, x.device, x.dtype)
    for rows, mask in keep_masks(x, own.drop, own.seed + first):
        torch.mul(x[rows], mask, out=out[rows])
    return out


def tensors_of(weight: Stack) -> Sequence[Tensor | None]:
    """What a backward pass needs of a weight."""
    return fused.tensors_of(weight.stored if isinstance(weight, QuantizedStack) else weight)


def rebuilt(weight: QuantizedStack | None, parts: Sequence[Tensor | None]) -> Stack:
    """The inverse of ``tensors_of``."""
    stored: Any = fused.rebuilt(None if weight is None else weight.stored, parts)
    return stored if weight is None else replace(weight, stored=stored)
