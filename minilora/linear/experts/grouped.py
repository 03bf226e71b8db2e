"""Products of many experts in one call: the frozen weights and the low-rank parts together, forward and backward.

    out[rows of e] = W[e] x[rows of e] + scaling * B[e] A[e] dropout(x[rows of e])          for every expert e that has rows

``lora_experts_reference`` is that formula and defines ``lora_experts``. No dense ``B A`` is formed, an expert without rows is neither
decoded nor read, and the loop is over experts, never over tokens. Dropout keeps a seed, as in ``linear/fused.py``. On a GPU packed
weights go to the grouped Triton kernels, and dense bf16 weights to the library's grouped product. Next file: ``linear/experts/whole.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.linear.experts.routes import Routes
from minilora.linear.experts.rows import (
    Factors,
    Matrices,
    Span,
    Stack,
    backward_rows,
    forward_rows,
    one_expert,
    rebuilt,
    tensors_of,
)
from minilora.linear.fused import as_written
from minilora.linear.ops import flowing_dtype, product_dtype
from minilora.quant.stack import QuantizedStack

__all__ = ["Stack", "grouped_linear", "lora_experts", "lora_experts_reference", "one_expert"]


def lora_experts(
    x: Tensor,
    weight: Stack,
    routes: Routes,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
    p: float = 0.0,
) -> Tensor:
    """The products of all experts with their rows.

    Args:
        x: ``[S, in]`` sorted by expert, any floating dtype; inside a ``torch.autocast`` block it is cast first.
        weight: ``[E, out, in]``, frozen: dense (a transposed view will do) or packed.
        routes: which rows belong to which expert.
        A: ``[E, r, in]`` and B: ``[E, out, r]``, or None for both: the frozen layer alone.
        p: probability that an input of A is dropped, each row apart, rounded to 1/65536; drawn as in ``lora_linear``.

    Returns:
        ``[S, out]`` in ``x``'s dtype; zeros for rows of no expert. Differentiable once with respect to ``x``, ``A`` and ``B``.
    """
    x, factors = x.to(flowing_dtype(x)), Factors.of(scaling, p)
    if torch.is_grad_enabled():
        out: Tensor = _Grouped.apply(x, A, B, weight, routes, factors)
        return out
    return _forward(x, A, B, weight, routes, factors)[0]


def lora_experts_reference(
    x: Tensor, weight: Stack, routes: Routes, A: Tensor, B: Tensor, scaling: float, keep: Tensor | None = None
) -> Tensor:
    """What ``lora_experts`` means; ``keep [S, in]`` is the mask of dropout divided by the share that it keeps, or None."""
    W = weight.dequantize(x.dtype) if isinstance(weight, QuantizedStack) else weight
    thin = grouped_linear(x if keep is None else x * keep, A.to(x.dtype), routes)
    return grouped_linear(x, W, routes) + grouped_linear(thin, B.to(x.dtype), routes) * scaling


def grouped_linear(x: Tensor, weight: Tensor, routes: Routes) -> Tensor:
    """``W[e] x[rows of e]`` for dense weights ``[E, out, in]`` that may train; by torch's own products, so it has every derivative."""
    parts = [F.linear(x[first:last], weight[expert]) for expert, first, last in routes.spans]
    done = routes.spans[-1][2] if parts else 0
    return torch.cat([*parts, x.new_zeros(len(x) - done, weight.shape[1])])


class _Grouped(torch.autograd.Function):
    """``h`` is ``[S, r]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor | None, B: Tensor | None, weight: Stack, routes: Routes, factors: Factors
    ) -> Tensor:
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.routes, ctx.factors = routes, factors
        out, h = _forward(x, A, B, weight, routes, factors)
        ctx.weight, ctx.shape = weight if isinstance(weight, QuantizedStack) else None, weight.shape
        kept = [x if need_A else None, A, B, h if need_B else None]
        ctx.save_for_backward(*kept, *(tensors_of(weight) if need_x else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, *parts = ctx.saved_tensors
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        weight = rebuilt(ctx.weight, parts) if need_x else torch.empty(()).expand(ctx.shape)
        routes, dtype = ctx.routes, product_dtype(grad.dtype, grad.device)
        spans, rows = _one_chunk(routes)
        with as_written(grad):
            of = Matrices(weight, A, B, ctx.factors, routes.experts, dtype)
            grad_A = factor_gradient(A, routes, dtype) if need_A else None
            grad_B = factor_gradient(B, routes, dtype) if need_B else None
            grad_x = grad.new_empty(len(grad), ctx.shape[2]) if need_x else None
            values = None if x is None else x[rows].to(dtype)
            part = None if grad_x is None else grad_x[rows]
            backward_rows(
                of, spans, grad[rows].to(dtype), values, 0, None if h is None else h[rows], grad_A, grad_B, part
            )
            if grad_x is not None:
                grad_x[rows.stop :] = 0
        grad_A, grad_B = (None if each is None else each.to(like.dtype) for each, like in ((grad_A, A), (grad_B, B)))
        return grad_x, grad_A, grad_B, None, None, None


def _forward(x: Tensor, A: Tensor | None, B: Tensor | None, weight: Stack, routes: Routes,
             factors: Factors) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output ``[S, out]``, and ``h = scaling * A dropout(x)`` as ``[S, r]``; ``scaling`` makes up for what is dropped."""
    dtype = product_dtype(x.dtype, x.device)
    with as_written(x):
        of = Matrices(weight, A, B, factors, routes.experts, dtype)
        (spans, rows), out = _one_chunk(routes), x.new_empty(len(x), weight.shape[1])
        h = None if A is None else x.new_empty(len(x), A.shape[1], dtype=dtype)
        forward_rows(of, spans, x[rows].to(dtype), 0, None if h is None else h[rows], out[rows])
        out[rows.stop :] = 0
        return out, h


def _one_chunk(routes: Routes) -> tuple[list[Span], slice]:
    """All rows that an expert has, and where they are."""
    spans = [Span(*span) for span in routes.spans]
    return spans, slice(0, spans[-1].last if spans else 0)


def factor_gradient(like: Tensor, routes: Routes, dtype: torch.dtype) -> Tensor:
    """Room for the gradient of a factor ``[E, ., .]``: zeros for an expert without rows; what the others get is written later."""
    if len(routes.spans) == len(like):
        return torch.empty_like(like, dtype=dtype)
    return torch.zeros_like(like, dtype=dtype)
