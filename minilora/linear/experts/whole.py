"""A whole experts module in one autograd function: up, gate, down and the weighted sum, a few hundred rows of one expert at a time.

    out[t] = sum over the k experts e of token t:  w[t, e] * down_e(gate(up_e(x[t])))

Between the two projections nothing is as long as all rows: what a chunk needs lies in buffers that are reused, because fresh memory costs
more than most of the arithmetic. Kept for the backward pass are ``x``, what goes into the gate, and r numbers a row; the gate is computed
again. The gradient of a weight is ``<g, down(a)> = <down^T g, a>``, so the outputs of the experts are not kept either.
``whole_experts_reference`` defines it. On the CPU; elsewhere ``forwards.routed`` goes projection by projection. Next file:
``linear/experts/known.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.linear.experts.grouped import factor_gradient, lora_experts
from minilora.linear.experts.routes import Routes
from minilora.linear.experts.rows import (
    Factors,
    Matrices,
    Span,
    Stack,
    backward_rows,
    forward_rows,
    tensors_of,
)
from minilora.linear.fused import as_written
from minilora.linear.ops import buffer, flowing_dtype, product_dtype
from minilora.quant.stack import QuantizedStack

__all__ = ["Gate", "Projection", "whole_experts", "whole_experts_reference"]

_ROOM = 1 << 20  # numbers in a buffer, so that what a chunk is made of stays in the cache
_ROWS = 512  # but so many rows of one expert at least: every chunk reads its matrices again


class Projection(NamedTuple):
    """One projection: ``W [E, out, in]``, frozen, with ``A [E, r, in]`` and ``B [E, out, r]`` or without, as in ``lora_experts``."""

    weight: Stack
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    p: float = 0.0


class Gate(NamedTuple):
    """What stands between the projections, row by row: ``[m, 2I]`` (or ``[m, I]``) to ``[m, I]``; nothing in it trains.

    ``is_swiglu``: it is ``silu(y[:, :I]) * y[:, I:]``, whose derivative is written out here; that of any other is autograd's.
    """

    function: Callable[[Tensor], Tensor]
    is_swiglu: bool = False

    def forward(self, y: Tensor) -> Tensor:
        """The value, in a buffer or fresh."""
        if not self.is_swiglu:
            return self.function(y)
        half = y.shape[1] // 2
        out = buffer("gated", (len(y), half), y.device, y.dtype)
        return torch.ops.aten.silu.out(y[:, :half], out=out).mul_(y[:, half:])

    def backward(self, grad: Tensor, y: Tensor) -> Tensor:
        """The gradient of ``y``, in a buffer or fresh."""
        if not self.is_swiglu:
            with torch.enable_grad():
                inner = y.detach().requires_grad_()
                return torch.autograd.grad(self.function(inner), inner, grad)[0]
        half = y.shape[1] // 2
        out, room = buffer("grad gate", y.shape, y.device, y.dtype), buffer("grad silu", grad.shape, y.device, y.dtype)
        torch.mul(grad, y[:, half:], out=room)
        torch.ops.aten.silu_backward.grad_input(room, y[:, :half], grad_input=out[:, :half])
        torch.ops.aten.silu.out(y[:, :half], out=out[:, half:]).mul_(grad)
        return out


def whole_experts(x: Tensor, weights: Tensor, routes: Routes, up: Projection, down: Projection, gate: Gate) -> Tensor:
    """Each token through its experts.

    Args:
        x: ``[T, H]``; inside a ``torch.autocast`` block it is cast first. weights: ``[T, k]``. routes: of the ``T * k`` pairs.

    Returns:
        ``[T, H]`` in at least fp32, in which the sum is taken. Differentiable once with respect to ``x``, ``weights`` and all factors.
    """
    x = x.to(flowing_dtype(x))
    factors = Factors.of(up.scaling, up.p), Factors.of(down.scaling, down.p)
    plan = _Plan(routes, up, down, *factors, gate)
    if torch.is_grad_enabled():
        out: Tensor = _Whole.apply(x, weights, up.A, up.B, down.A, down.B, plan)
        return out
    return _forward(x, weights, plan, False)[0]


def whole_experts_reference(
    x: Tensor, weights: Tensor, routes: Routes, up: Projection, down: Projection, gate: Gate
) -> Tensor:
    """What ``whole_experts`` means, projection by projection (without dropout, of which the masks are drawn otherwise)."""
    y = lora_experts(x[routes.tokens], up.weight, routes, up.A, up.B, up.scaling)
    y = lora_experts(gate.function(y), down.weight, routes, down.A, down.B, down.scaling)
    y = y.to(torch.promote_types(y.dtype, torch.float32)) * weights.reshape(-1)[routes.order].unsqueeze(1)
    return torch.zeros(len(x), y.shape[1], dtype=y.dtype, device=y.device).index_add(0, routes.tokens, y)


class _Plan(NamedTuple):
    routes: Routes
    up: Projection
    down: Projection
    up_factors: Factors
    down_factors: Factors
    gate: Gate

    def chunks(self) -> Iterator[tuple[slice, list[Span]]]:
        """Rows, and whose they are: several experts with few rows, or a part of the rows of one."""
        up, down = self.up.weight, self.down.weight
        packed = isinstance(up, QuantizedStack) or isinstance(down, QuantizedStack)
        step = max(_ROWS, _ROOM // max(*up.shape[1:], *down.shape[1:])) * (2 if packed else 1)  # and decodes them
        start, spans = 0, list[Span]()
        for expert, first, last in self.routes.spans:
            for at in range(first, last, step):
                end = min(at + step, last)
                if spans and end - start > step:
                    yield slice(start, at), spans
                    start, spans = at, []
                spans.append(Span(expert, at - start, end - start, at > first))
        if spans:
            yield slice(start, start + spans[-1].last), spans

    def matrices(self, dtype: torch.dtype) -> tuple[Matrices, Matrices]:
        experts = self.routes.experts
        up = Matrices(self.up.weight, self.up.A, self.up.B, self.up_factors, experts, dtype)
        return up, Matrices(self.down.weight, self.down.A, self.down.B, self.down_factors, experts, dtype)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, *given: Any) -> Tensor:
        *factors, plan = given
        out, *made = _forward(x, weights, plan, True)
        # The plan holds weights and factors; they are saved too, so that autograd notices who writes to them.
        ctx.plan, watched = plan, [*factors, *tensors_of(plan.up.weight), *tensors_of(plan.down.weight)]
        ctx.save_for_backward(x, weights, *made, *watched)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, y, h_up, h_down, *_ = ctx.saved_tensors
        with as_written(grad):
            return *_backward(grad, x, weights, y, h_up, h_down, ctx.plan, ctx.needs_input_grad), None


def _forward(
    x: Tensor, weights: Tensor, plan: _Plan, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The sum ``[T, H]``; and where they are kept what goes into the gate ``[S, 2I]``, and both ``h [S, r]``."""
    dtype, routes = product_dtype(x.dtype, x.device), plan.routes
    with as_written(x):
        up, down = plan.matrices(dtype)
        out = x.new_zeros(len(x), down.out_features, dtype=torch.promote_types(x.dtype, torch.float32))
        tokens, shares = routes.tokens, _sorted(weights, routes, out.dtype)
        y, h_up, h_down = (
            x.new_empty(len(tokens), width, dtype=kind) if keep and width else None
            for width, kind in ((up.out_features, x.dtype), (up.r, dtype), (down.r, dtype))
        )
        for rows, spans in plan.chunks():
            own = tokens[rows]
            before = _room("y", y, rows, up.out_features, x.dtype, x)
            values = _taken("x", x, own).to(dtype)
            forward_rows(up, spans, values, rows.start, _room("h", h_up, rows, up.r, dtype, x), before)
            gated = plan.gate.forward(before).to(dtype)
            each = buffer("each", (len(own), down.out_features), x.device, x.dtype)
            forward_rows(down, spans, gated, rows.start, _room("h", h_down, rows, down.r, dtype, x), each)
            weighted = buffer("weighted", each.shape, x.device, out.dtype)
            out.index_add_(0, own, torch.mul(each, shares[rows], out=weighted))
    return out, y, h_up, h_down


def _backward(grad: Tensor, x: Tensor, weights: Tensor, y: Tensor, h_up: Tensor | None, h_down: Tensor | None, plan: _Plan,
              needs: tuple[bool, ...]) -> list[Tensor | None]:  # fmt: skip
    """The gradients of ``x``, ``weights`` and the four factors; None for those that nobody needs."""
    dtype, routes = product_dtype(x.dtype, x.device), plan.routes
    (up, down), tokens, shares = plan.matrices(dtype), routes.tokens, _sorted(weights, routes, grad.dtype)
    need_x, need_weights, *need_factors, _ = needs
    grad_x = torch.zeros_like(x, dtype=grad.dtype) if need_x else None
    grad_shares = grad.new_zeros(len(tokens)) if need_weights else None
    factors = plan.up.A, plan.up.B, plan.down.A, plan.down.B
    grads = [factor_gradient(like, routes, dtype) if need and like is not None else None
             for like, need in zip(factors, need_factors, strict=True)]  # fmt: skip
    deeper = need_x or any(need_factors[:2])
    for rows, spans in plan.chunks():
        own = tokens[rows]
        share, before, g = shares[rows].to(dtype), y[rows], _taken("grad", grad, own).to(dtype)
        gated = plan.gate.forward(before).to(dtype)
        # Not g but what it meets is weighted, so that the weights' own gradient can be read off.
        h = None if h_down is None or grads[3] is None else h_down[rows] * share
        values = (
            torch.mul(gated, share, out=buffer("met", gated.shape, x.device, dtype)) if grads[2] is not None else None
        )
        back = buffer("back", gated.shape, x.device, dtype) if deeper or need_weights else None
        backward_rows(down, spans, g, values, rows.start, h, grads[2], grads[3], back)
        if back is None:
            continue
        if grad_shares is not None:
            product = torch.mul(back, gated, out=buffer("product", back.shape, x.device, dtype))
            grad_shares[rows] = product.sum(1, dtype=grad.dtype)
        if deeper:
            g = plan.gate.backward(back.mul_(share).to(x.dtype), before).to(dtype)
            values = _taken("x", x, own).to(dtype) if grads[0] is not None else None
            part = None if grad_x is None else buffer("each", (len(own), up.in_features), x.device, dtype)
            backward_rows(
                up, spans, g, values, rows.start, None if h_up is None else h_up[rows], grads[0], grads[1], part
            )
            if grad_x is not None and part is not None:
                grad_x.index_add_(0, own, part.to(grad.dtype))
    grads = [None if each is None else each.to(like.dtype) for each, like in zip(grads, factors, strict=True)]  # type: ignore[union-attr]
    return [None if grad_x is None else grad_x.to(x.dtype), _unsorted(grad_shares, routes, weights), *grads]


def _sorted(weights: Tensor, routes: Routes, dtype: torch.dtype) -> Tensor:
    """The weight of every sorted row, ``[S, 1]``."""
    return weights.detach().reshape(-1)[routes.order].unsqueeze(1).to(dtype)


def _unsorted(values: Tensor | None, routes: Routes, like: Tensor) -> Tensor | None:
    """The inverse for ``[S]``: as ``like``, ``[T, k]``."""
    if values is None:
        return None
    out = torch.empty_like(values)
    out[routes.order] = values
    return out.view(like.shape).to(like.dtype)


def _taken(name: str, x: Tensor, own: Tensor) -> Tensor:
    """``x[own]`` in a buffer."""
    return torch.index_select(x, 0, own, out=buffer(name, (len(own), x.shape[1]), x.device, x.dtype))


def _room(name: str, kept: Tensor | None, rows: slice, width: int, dtype: torch.dtype, like: Tensor) -> Any:
    """Where something of a chunk is written: the rows of what is kept, or a buffer; None where it is no number wide."""
    if kept is not None or not width:
        return None if kept is None else kept[rows]
    return buffer(name, (rows.stop - rows.start, width), like.device, dtype)
