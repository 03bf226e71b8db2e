"""The adapted linear layer as one autograd function: base and low-rank part together, for dense and for packed weights.

``lora_linear_reference`` is the formula in three lines and defines it. What the function does better, forward and backward:

* the low-rank part is added in place to the product with the base; the input's gradient is gathered in one tensor;
* thin products are taken in the orientation in which the matrix library is fast (``[r, M]``, not ``[M, r]``);
* dropout keeps a seed and not a mask nor a dropped copy of ``x``: the mask is drawn again in the backward pass;
* bf16 and fp16 are multiplied in fp32 where the processor cannot multiply them (``ops.product_dtype``).

Kept for the backward pass: ``x``, ``A x`` (r numbers a token) and what is there anyway. No second derivative.
Next file: ``many/adapted.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.linear.ops import bias_gradient, buffer, flowing_dtype, matmul, product_dtype
from minilora.quant.weight import PackedWeight

Weight = Tensor | PackedWeight
_ELEMENTS = 1 << 17  # of a mask at a time
_STEPS = 1 << 16  # a probability of dropout is a whole number of these parts


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
    p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``W x + bias + scaling * B A dropout(x)``.

    Args:
        x: ``[..., in]``, any floating dtype; inside a ``torch.autocast`` block it is cast first.
        weight: ``[out, in]``, frozen: a dense tensor (a transposed view will do) or a quantized one.
        bias: ``[out]`` or None. A: ``[r, in]`` and B: ``[out, r]``, or None for both: the frozen layer alone.
        p: probability that an input of A is dropped, rounded to 1/65536; drawn from torch's generator on the CPU.
        backend: as ``ops.quant_linear``.

    Returns:
        ``[..., out]`` in ``x``'s dtype. Differentiable once with respect to ``x``, ``bias``, ``A`` and ``B``; the weight gets no gradient.
    """
    grad = torch.is_grad_enabled()
    if not grad and not p and A is not None and B is not None and _all_alike(x, weight, bias, A, B):
        out = F.linear(x, weight, bias)  # type: ignore[arg-type]  # the same with little around it: one token, one layer after the other
        out.view(-1, out.shape[-1]).addmm_(F.linear(x, A).view(-1, A.shape[0]), B.t(), alpha=scaling)
        return out
    x, drop = x.to(flowing_dtype(x)), parts_dropped(p)
    kept = made_up(scaling, drop)
    if grad:
        flat = _LoRALinear.apply(x, bias, A, B, weight, kept, drop, backend)
    else:
        flat = _forward(x, bias, A, B, weight, kept, drop, new_seed(drop), backend)[0]
    # Shaped out here: what a Function returns as a view of its own must not be written to, and models do (ReLU(inplace=True)).
    return flat.view(*x.shape[:-1], flat.shape[1])


def parts_dropped(p: float) -> int:
    """A probability of dropout in parts of 1/65536."""
    return min(round(p * _STEPS), _STEPS - 1)


def made_up(scaling: float, drop: int) -> float:
    """``scaling`` times what makes up for ``drop`` parts of 1/65536."""
    return scaling * _STEPS / (_STEPS - drop)


def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
) -> Tensor:
    """What ``lora_linear`` means; ``keep`` is the mask of dropout divided by the share that it keeps, or None."""
    W = weight.dequantize(x.dtype) if isinstance(weight, PackedWeight) else weight
    thin = F.linear(x if keep is None else x * keep, A.to(x.dtype))
    return F.linear(x, W, None if bias is None else bias.to(x.dtype)) + F.linear(thin, B.to(x.dtype)) * scaling


def keep_masks(like: Tensor, drop: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask of dropout for ``like [M, in]``, a few rows at a time: ``(rows, bool [rows, in])``, in a buffer that is reused.

    Each element is False with probability ``drop / 65536``; a random word of 64 bits decides four. One seed gives one mask.
    """
    draw = torch.Generator(like.device).manual_seed(seed)
    height, width = like.shape
    step = 4 * max(1, _ELEMENTS // (4 * max(1, width)))  # whole words, whatever the width
    for first in range(0, height, step):
        rows = min(step, height - first)
        words = buffer("words", (1, -(-rows * width // 4)), like.device, torch.int64)
        words.random_(-(2**63), None, generator=draw)  # every int64; the default would leave out the negative half
        chances = words.view(torch.int16).view(-1)[: rows * width].view(rows, width)
        mask = buffer("mask", (rows, width), like.device, torch.bool)
        yield slice(first, first + rows), torch.ge(chances, drop - _STEPS // 2, out=mask)


class _LoRALinear(torch.autograd.Function):
    """Saves what the gradients that are asked for need, and no more. ``h`` and ``gh`` are ``[r, M]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, weight: Weight,
                scaling: float, drop: int, backend: str | None) -> Tensor:  # fmt: skip
        need_x, ctx.need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.scaling, ctx.drop, ctx.seed, ctx.backend = scaling, drop, new_seed(drop), backend
        ctx.shape, ctx.dtype = x.shape, product_dtype(x.dtype, x.device)
        ctx.bias_dtype = None if bias is None else bias.dtype
        out, h = _forward(x, bias, A, B, weight, scaling, drop, ctx.seed, backend)
        ctx.weight = weight if isinstance(weight, PackedWeight) else None
        kept = [x if need_A else None, A, B, h if need_B else None]
        ctx.save_for_backward(*kept, *(tensors_of(weight) if need_x else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, *parts = ctx.saved_tensors
        need_x, _, need_A, need_B, *_ = ctx.needs_input_grad
        grad_x = grad_bias = grad_A = grad_B = gh = values = None
        with as_written(grad):
            out = grad.reshape(-1, grad.shape[-1])
            g = out.to(ctx.dtype) if A is not None else out
            if A is not None and (need_x or need_A):
                gh = torch.mm(B.to(ctx.dtype).t(), g.t()).mul_(ctx.scaling)
            if need_B:
                grad_B = torch.mm(h, g).t().to(B.dtype)
            if need_A:
                values = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            if need_x:
                thin = None if gh is None or ctx.drop else gh.t()
                grad_x = matmul(g, rebuilt(ctx.weight, parts), False, thin, A, out_dtype=ctx.dtype, backend=ctx.backend)
            if gh is not None:
                grad_A = through_A(gh, A, values, grad_x, ctx.dtype, ctx.drop, ctx.seed)
            grad_x = None if grad_x is None else grad_x.to(grad.dtype).view(ctx.shape)
            if ctx.need_bias:
                grad_bias = bias_gradient(out, ctx.bias_dtype)
        return grad_x, grad_bias, grad_A, grad_B, None, None, None, None


def _forward(x: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, weight: Weight, scaling: float, drop: int,
             seed: int, backend: str | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output ``[M, out]``, and ``h = scaling * A dropout(x)`` as ``[r, M]``; ``scaling`` makes up for what is dropped."""
    dtype, h = product_dtype(x.dtype, x.device), None
    with as_written(x):
        values = x.reshape(-1, x.shape[-1]).to(dtype)
        if A is not None:
            h = (thin_product(values, A.to(dtype), drop, seed) if drop else torch.mm(A.to(dtype), values.t())).mul_(
                scaling
            )
        out = matmul(values, weight, True, None if h is None else h.t(), B, bias, x.dtype, backend)
    return out, h


def _all_alike(x: Tensor, weight: Weight, *parts: Tensor | None) -> bool:
    """Whether no part of the product needs a cast or a decoding, and no small thing is special."""
    if not isinstance(weight, Tensor) or x.dtype is not torch.float32 or torch.is_autocast_enabled(x.device.type):
        return False
    return all(part is None or part.dtype is torch.float32 for part in (weight, *parts))


def new_seed(drop: int) -> int:
    """From torch's generator, so that ``torch.manual_seed`` and gradient checkpointing reach it; none is drawn without dropout."""
    return int(torch.randint(2**62, (), device="cpu")) if drop else 0


def thin_product(values: Tensor, A: Tensor, drop: int, seed: int) -> Tensor:
    """``A (mask * x)``, ``[r, M]``."""
    h = values.new_empty(len(A), len(values))
    for rows, mask in keep_masks(values, drop, seed):
        kept = torch.mul(values[rows], mask, out=buffer("kept", mask.shape, values.device, values.dtype))
        torch.mm(A, kept.t(), out=h[:, rows])
    return h


def through_A(
    gh: Tensor, A: Tensor, values: Tensor | None, grad_x: Tensor | None, dtype: torch.dtype, drop: int, seed: int
) -> Tensor | None:
    """The gradient of A, if ``values`` are given; with dropout also, in place, its part of that of x: one mask is drawn for both."""
    if not drop:
        return None if values is None else torch.mm(gh, values).to(A.dtype)
    grad_A = None if values is None else torch.zeros_like(A, dtype=dtype)
    like = grad_x if values is None else values
    assert like is not None
    for rows, mask in keep_masks(like, drop, seed):
        room = buffer("kept", mask.shape, like.device, dtype)
        if values is not None and grad_A is not None:
            grad_A.addmm_(gh[:, rows], torch.mul(values[rows], mask, out=room))
        if grad_x is not None:
            grad_x[rows].addcmul_(torch.mm(gh[:, rows].t(), A.to(dtype), out=room), mask)
    return None if grad_A is None else grad_A.to(A.dtype)


def tensors_of(weight: Weight) -> Sequence[Tensor | None]:
    """What the backward pass needs of a weight."""
    return weight.parts() if isinstance(weight, PackedWeight) else [weight]


def rebuilt(weight: PackedWeight | None, parts: Sequence[Tensor | None]) -> Weight:
    """The inverse of ``tensors_of``."""
    if weight is not None:
        return weight.with_parts(parts)
    return parts[0]  # type: ignore[return-value]


def as_written(like: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtypes that they are written in, ``torch.autocast`` or not."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
