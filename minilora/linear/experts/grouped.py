"""Products of many experts in one call: the frozen weights and the low-rank parts together, forward and backward.

    out[rows of e] = W[e] x[rows of e] + scaling * B[e] A[e] dropout(x[rows of e])          for every expert e that has rows

``lora_experts_reference`` is that formula and defines ``lora_experts``. No dense ``B A`` is formed, an expert without rows is neither
decoded nor read, and the loop is over experts, never over tokens. Dropout keeps a seed, as in ``linear/fused.py``. On a GPU packed
weights go to the grouped Triton kernels, and dense bf16 weights to the library's grouped product. Next file: ``linear/experts/known.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from minilora.linear.experts.routes import Routes
from minilora.linear.fused import Weight, as_written, keep_masks, new_seed, parts_dropped
from minilora.linear.ops import flowing_dtype, matmul, on_paper_matmul, product_dtype
from minilora.quant.stack import QuantizedStack

__all__ = ["Stack", "grouped_linear", "lora_experts", "lora_experts_reference"]

Stack = Tensor | QuantizedStack
_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")
_STEPS = 1 << 16


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
        p: probability that an input of A is dropped, each row apart; drawn as in ``lora_linear``.

    Returns:
        ``[S, out]`` in ``x``'s dtype; zeros for rows of no expert. Differentiable once with respect to ``x``, ``A`` and ``B``.
    """
    x, drop = x.to(flowing_dtype(x)), parts_dropped(p)
    kept = scaling * _STEPS / (_STEPS - drop)
    if torch.is_grad_enabled():
        return _Grouped.apply(x, A, B, weight, routes, kept, drop)
    return _forward(x, A, B, weight, routes, kept, drop, new_seed(drop))[0]


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
    """``h`` and ``gh`` are ``[r, S]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor | None, B: Tensor | None, weight: Stack, routes: Routes, scaling: float,
                drop: int) -> Tensor:  # fmt: skip
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.routes, ctx.scaling, ctx.drop, ctx.seed = routes, scaling, drop, new_seed(drop)
        ctx.dtype = product_dtype(x.dtype, x.device)
        out, h = _forward(x, A, B, weight, routes, scaling, drop, ctx.seed)
        ctx.weight = weight if isinstance(weight, QuantizedStack) else None
        kept = [x if need_A else None, A, B, h if need_B else None]
        ctx.save_for_backward(*kept, *(_tensors_of(weight) if need_x else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, *parts = ctx.saved_tensors
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        weight = _rebuilt(ctx.weight, parts) if need_x else None
        with as_written(grad):
            g = grad.to(ctx.dtype)
            gh = None if A is None else _thin(g, B.to(ctx.dtype).transpose(1, 2), ctx.routes).mul_(ctx.scaling)
            grad_B = _outer(g.t(), h, ctx.routes, B) if need_B else None
            values = _dropped(x.to(ctx.dtype), ctx.drop, ctx.seed) if need_A else None
            grad_A = None if gh is None or values is None else _outer(gh, values.t(), ctx.routes, A)
            grad_x = None
            if weight is not None:
                grad_x = _products(g, weight, ctx.routes, False, None if ctx.drop else gh, A, ctx.dtype)
                if ctx.drop and gh is not None:
                    through = _products(gh.t(), A.to(ctx.dtype), ctx.routes, False, None, None, ctx.dtype)
                    grad_x += _dropped(through, ctx.drop, ctx.seed)
                grad_x = grad_x.to(grad.dtype)
        return grad_x, grad_A, grad_B, None, None, None, None


def _forward(x: Tensor, A: Tensor | None, B: Tensor | None, weight: Stack, routes: Routes, scaling: float, drop: int,
             seed: int) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output ``[S, out]``, and ``h = scaling * A dropout(x)`` as ``[r, S]``; ``scaling`` makes up for what is dropped."""
    dtype, h = product_dtype(x.dtype, x.device), None
    with as_written(x):
        values = x.to(dtype)
        if A is not None:
            h = _thin(_dropped(values, drop, seed), A.to(dtype), routes).mul_(scaling)
        return _products(values, weight, routes, True, h, B, x.dtype), h


def _products(x: Tensor, weight: Stack, routes: Routes, transpose: bool, h: Tensor | None, thin: Tensor | None,
              out_dtype: torch.dtype) -> Tensor:  # fmt: skip
    """``x W[e]^T + h^T thin[e]^T`` (``transpose``; ``thin`` is B), or ``x W[e] + h^T thin[e]`` (``thin`` is A), expert by expert."""
    width = weight.shape[1] if transpose else weight.shape[2]
    out = x.new_empty(len(x), width, dtype=out_dtype)
    done = 0
    for expert, first, done in routes.spans:
        rows, low = x[first:done], None if h is None else h[:, first:done].t()
        own = None if thin is None else thin[expert]
        if isinstance(weight, Tensor) and weight.dtype == x.dtype == out_dtype:
            part = torch.mm(rows, weight[expert].t() if transpose else weight[expert], out=out[first:done])
            if low is not None and own is not None:
                own = own.to(x.dtype)
                part.addmm_(low, own.t() if transpose else own)
        elif isinstance(weight, QuantizedStack) and isinstance(x, FakeTensor):
            part = on_paper_matmul(rows, weight.one(expert), transpose)
            out[first:done] = part if low is None or own is None else part.addmm_(low, own.t() if transpose else own)
        else:
            out[first:done] = matmul(rows, one_expert(weight, expert), transpose, low, own, None, out_dtype)
    out[done:] = 0
    return out


def _thin(x: Tensor, weight: Tensor, routes: Routes) -> Tensor:
    """``weight[e] x[rows of e]^T`` for thin ``weight [E, r, in]``, as ``[r, S]``: the orientation in which such products are fast."""
    h = x.new_zeros(weight.shape[1], len(x))
    for expert, first, last in routes.spans:
        torch.mm(weight[expert], x[first:last].t(), out=h[:, first:last])
    return h


def _outer(left: Tensor, right: Tensor, routes: Routes, like: Tensor) -> Tensor:
    """``left[:, rows of e] right[:, rows of e]^T`` for each expert: the gradient of a factor, zeros for an expert without rows."""
    out = left.new_zeros(like.shape)
    for expert, first, last in routes.spans:
        torch.mm(left[:, first:last], right[:, first:last].t(), out=out[expert])
    return out.to(like.dtype)


def _dropped(x: Tensor, drop: int, seed: int) -> Tensor:
    """``x`` with the mask of a seed on it; ``x`` itself without dropout."""
    if not drop:
        return x
    out = torch.empty_like(x)
    for rows, mask in keep_masks(x, drop, seed):
        torch.mul(x[rows], mask, out=out[rows])
    return out


def one_expert(weight: Stack, expert: int) -> Weight:
    """One expert's matrix, ``[out, in]``, dense or packed as the stack is."""
    return weight.one(expert) if isinstance(weight, QuantizedStack) else weight[expert]


def _tensors_of(weight: Stack) -> Sequence[Tensor | None]:
    return [getattr(weight.stored, name) for name in _PARTS] if isinstance(weight, QuantizedStack) else [weight]


def _rebuilt(weight: QuantizedStack | None, parts: Sequence[Tensor | None]) -> Stack:
    """The inverse of ``_tensors_of``."""
    if weight is None:
        return parts[0]  # type: ignore[return-value]
    own: dict[str, Any] = dict(zip(_PARTS, parts, strict=True))
    return replace(weight, stored=replace(weight.stored, **own))
