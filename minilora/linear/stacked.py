"""One product with a frozen weight for the rows of several runs, and on each run's rows a low-rank part of its own.

    y = W x + bias           for all rows at once: a packed weight is decoded once
    y[rows_k] += s_k * B_k A_k dropout_k(x[rows_k])          for each of the runs k

``stacked_linear_reference`` is the formula and defines it. Each part is computed as ``lora_linear`` computes it for these rows alone, its
mask of dropout from the same seed, so a run beside others learns what it would learn alone. Next file: ``lab/sweeps/together.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.linear.fused import (
    Weight,
    as_written,
    lora_linear_reference,
    made_up,
    parts_dropped,
    rebuilt,
    tensors_of,
    thin_product,
    through_A,
)
from minilora.linear.ops import flowing_dtype, matmul, product_dtype
from minilora.quant.weight import PackedWeight

__all__ = ["Part", "stacked_linear", "stacked_linear_reference"]

Place = slice | Tensor


@dataclass(frozen=True)
class Part:
    """The update of one run.

    Attributes:
        place: which rows of ``[M, in]`` are the run's: a slice, or int64 indices where padding lies between them.
        A: ``[r, in]``. B: ``[out, r]``. p: probability that an input of A is dropped. seed: of its mask.
    """

    place: Place
    A: Tensor
    B: Tensor
    scaling: float
    p: float = 0.0
    seed: int = 0


def stacked_linear(x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """The product of all rows with the weight, and the parts on theirs.

    Args:
        x: ``[..., in]``, whose leading dimensions are the rows that ``place`` counts. weight: ``[out, in]``, frozen, dense or quantized.
        bias: ``[out]``, frozen, or None. parts: no two of the same rows.

    Returns:
        ``[..., out]`` in ``x``'s dtype. Differentiable once with respect to ``x`` and every A and B.
    """
    x = x.to(flowing_dtype(x))
    factors = [factor for part in parts for factor in (part.A, part.B)]
    flat: Tensor = _Stacked.apply(x, bias, weight, parts, *factors)
    return flat.view(*x.shape[:-1], flat.shape[1])


def stacked_linear_reference(
    x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part], keeps: Sequence[Tensor | None]
) -> Tensor:
    """What ``stacked_linear`` means for ``x [M, in]``; ``keeps``: as ``keep`` of ``lora_linear_reference``, one for each part."""
    W = weight.dequantize(x.dtype) if isinstance(weight, PackedWeight) else weight
    out = torch.nn.functional.linear(x, W, bias)
    for part, keep in zip(parts, keeps, strict=True):
        own = lora_linear_reference(x[part.place], W, bias, part.A, part.B, part.scaling, keep)
        out = out.index_put((torch.arange(len(x))[part.place],), own)
    return out


class _Stacked(torch.autograd.Function):
    """Kept for the backward pass: ``x``, and ``h = scaling * A x`` of each part, ``[r, m]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Weight, parts: Sequence[Part], *factors: Tensor
    ) -> Tensor:
        ctx.parts, ctx.shape, ctx.dtype = parts, x.shape, product_dtype(x.dtype, x.device)
        ctx.weight = weight if isinstance(weight, PackedWeight) else None
        thin = []
        with as_written(x):
            values = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            out = matmul(values, weight, True, bias=bias, out_dtype=ctx.dtype)
            for part, A, B in zip(parts, factors[::2], factors[1::2], strict=True):
                own, (scaling, drop), A = values[part.place], _scaled(part), A.to(ctx.dtype)
                h = (thin_product(own, A, drop, part.seed) if drop else torch.mm(A, own.t())).mul_(scaling)
                thin.append(h)
                _add(out, part.place, h.t(), B.to(ctx.dtype).t())
        needs_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(x, *factors, *thin, *(tensors_of(weight) if needs_x else ()))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.parts)
        x, *rest = ctx.saved_tensors
        factors, thin, tensors = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        needed = ctx.needs_input_grad[4:]
        grads: list[Tensor | None] = []
        with as_written(grad):
            g = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
            values = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            gx = matmul(g, rebuilt(ctx.weight, tensors), False, out_dtype=ctx.dtype) if tensors else None
            for number, (part, h) in enumerate(zip(ctx.parts, thin, strict=True)):
                A, B = factors[2 * number : 2 * number + 2]
                need_A, need_B = needed[2 * number : 2 * number + 2]
                own, (scaling, drop) = g[part.place], _scaled(part)
                grad_A = None
                if need_A or gx is not None:
                    gh = torch.mm(B.to(ctx.dtype).t(), own.t()).mul_(scaling)
                    if gx is not None and not drop:
                        _add(gx, part.place, gh.t(), A.to(ctx.dtype))
                    grad_A = _through(ctx, part, gh, A, values if need_A else None, gx, drop)
                grads.append(grad_A)
                grads.append(torch.mm(h, own).t().to(B.dtype) if need_B else None)
        return None if gx is None else gx.to(grad.dtype).view(ctx.shape), None, None, None, *grads


def _through(
    ctx: Any, part: Part, gh: Tensor, A: Tensor, values: Tensor | None, gx: Tensor | None, drop: int
) -> Tensor | None:
    """As ``fused.through_A`` on the part's rows: the gradient of A, and with dropout its part of that of x."""
    own = None if values is None else values[part.place]
    if not drop or gx is None or isinstance(part.place, slice):  # a slice is a view, and is written into
        return through_A(gh, A, own, None if gx is None else gx[part.place], ctx.dtype, drop, part.seed)
    rows = gx[part.place]
    found = through_A(gh, A, own, rows, ctx.dtype, drop, part.seed)
    gx[part.place] = rows
    return found


def _scaled(part: Part) -> tuple[float, int]:
    """The scaling that makes up for what is dropped, and the probability in parts of 1/65536."""
    drop = parts_dropped(part.p)
    return made_up(part.scaling, drop), drop


def _add(out: Tensor, place: Place, left: Tensor, right: Tensor) -> None:
    """``out[place] += left @ right``."""
    if isinstance(place, slice):
        out[place].addmm_(left, right)
    else:
        out.index_add_(0, place, torch.mm(left, right))
