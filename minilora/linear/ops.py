"""The only door to speed: products with a frozen weight, packed or dense.

``quant_linear(x, weight, bias)`` is ``F.linear(x, weight.dequantize(x.dtype), bias)``; that line (``quant_linear_reference``) defines
it. The operator never holds the dense weight whole: rows are decoded into a small buffer that is reused, multiplied, and forgotten,
and the backward pass decodes the same packed bytes again (``dx = dy W``; QLoRA section 3), so nothing dense is saved for it.
Being a registered operator, it passes through ``torch.compile`` without a graph break. There is no second derivative.

``matmul`` is the arithmetic under it and under ``fused.py``. On a GPU it hands packed weights to the Triton kernels (``cuda.py``), unless
``backend`` says otherwise: "reference" decodes with PyTorch everywhere, "triton" wants the kernels. On a processor that cannot multiply a
dtype it works in fp32, a few rows of the weight at a time. Next file: ``linear/fused.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import ConfigError, QuantizationError
from minilora.linear import cuda
from minilora.quant.codebooks import Codebook
from minilora.quant.gguf.tensor import GGUFTensor
from minilora.quant.lookup import scratch
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.weight import PackedWeight

_ROWS = 1 << 20  # weights decoded at a time for a product: 4 MB of fp32
_ROWS_FEW = 1 << 18  # the same where x has few rows: what was decoded is still in the cache when it is multiplied
_FEW = 16
BACKENDS = ("reference", "triton")


class Paper:
    """Buffers without numbers, kept from call to call as the real ones are. ``mode`` makes them, ``note`` sees each."""

    def __init__(self, mode: AbstractContextManager[Any], note: Callable[[Tensor], None]) -> None:
        self.mode, self.note, self.held = mode, note, dict[tuple[str, torch.dtype], Tensor]()

    def buffer(self, name: str, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[count]``."""
        own = self.held.pop((name, dtype), None)
        if own is None or own.numel() < count:
            own = None  # the smaller one goes first
            with self.mode:
                own = torch.empty(count, dtype=dtype, device=device)
            self.note(own)
        self.held[name, dtype] = own
        return own[:count]


paper: ContextVar[Paper | None] = ContextVar(
    "minilora_paper", default=None
)  # while a step runs on it (``measure/plan.py``)


def quant_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """``x W^T + bias`` with a quantized ``W``.

    Args:
        x: ``[..., in]``, fp32, bf16 or fp16.
        weight: quantized ``[out, in]``.
        bias: ``[out]`` or None; trains if it requires grad.
        backend: "reference" (PyTorch), "triton" (the kernels), or None: the kernels where they can be had.

    Returns:
        ``[..., out]`` in ``x``'s dtype. Differentiable once with respect to ``x`` and ``bias``; inside a transform of ``torch.func`` or in
        forward mode it is the reference, which has every derivative.

    Raises:
        QuantizationError: the weight is not 2-D, ``x`` does not end in its ``in`` or is not floating. ConfigError: no such backend.
        MissingPackageError: "triton" without Triton.
    """
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise QuantizationError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}; wanted [..., in]"
        )
    if not x.is_floating_point():
        raise QuantizationError(
            f"x is {x.dtype}, wanted a floating dtype; to cast to what a packed layer computes in, ask layer.weight.dtype"
        )
    x = x.to(flowing_dtype(x))
    if is_transformed():
        return F.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    out: Tensor = _product(x.reshape(-1, x.shape[-1]), *_flatten(weight), transpose=True, bias=bias, backend=backend)
    return out.view(*x.shape[:-1], weight.shape[0])


def quant_linear_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """What ``quant_linear`` means, in one line; dense, slow, differentiable by torch itself."""
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``grad``, ``vmap``, ``jvp``) or forward mode is at work, which wants plain formulas."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def dequantize(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """``weight.dequantize(dtype)`` as an operator: a compiler can leave it out, and transforms of ``torch.func`` do not look inside."""
    return _dense(*_flatten(weight), dtype=dtype or weight.dtype)


def _flatten(weight: PackedWeight) -> tuple:
    """A packed weight as the plain arguments that an operator can take."""
    parts = (*weight.parts(), None, None, None)[:4]
    return *parts, weight.format, list(weight.levels), weight.unit, *weight.shape


@functools.lru_cache(maxsize=32)
def _book(levels: tuple[float, ...]) -> Codebook:
    return Codebook("operator", levels, "passed to an operator")


def _gather(packed: Tensor, absmax: Tensor | None, nested: Tensor | None, offset: Tensor | None, format: str, levels: list[float],
            unit: int, rows: int, columns: int) -> PackedWeight:  # fmt: skip
    """The inverse, in fp32."""
    shape = torch.Size((rows, columns))
    if absmax is None:
        return GGUFTensor(packed, format, shape)
    return QuantizedTensor(packed, absmax, shape, torch.float32, _book(tuple(levels)), unit, nested, offset)


@functools.lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; without, torch's bf16 products are 8 to 100 times slower than fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def flowing_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which ``F.linear`` would cast ``x`` here: that of a ``torch.autocast`` block (which leaves fp64), or ``x``'s own."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what a product is taken: bf16 only where the processor has it, fp16 never on a CPU; otherwise as given."""
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bf16())
    return torch.float32 if device.type == "cpu" and slow else dtype


def matmul(x: Tensor, weight: Tensor | PackedWeight, transpose: bool, h: Tensor | None = None, B: Tensor | None = None,
           bias: Tensor | None = None, out_dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:  # fmt: skip
    """``x W^T + h B^T + bias`` (``transpose``; ``[M, in]`` to ``[M, out]``), or ``x W + h B`` (``[M, out]`` to ``[M, in]``).

    Args:
        x: two dimensions. weight: ``[out, in]``, dense (a transposed view will do) or quantized; any dtype.
        h, B: thin factors, or None: ``[M, r]`` with ``[out, r]`` (``transpose``), or with ``[r, in]``.
        bias: ``[out]`` or None; only with ``transpose``.
        out_dtype: of the result; default ``x``'s. backend: as ``quant_linear``; a dense weight has one way only.

    Not differentiable: callers know the derivative. It writes into buffers that the next call reuses, never returns one.
    """
    if isinstance(weight, PackedWeight) and takes_kernels(x, weight, backend):
        return cuda.matmul(x, weight, transpose, h, B, bias, out_dtype)
    dtype = product_dtype(x.dtype, x.device)
    h, B, bias = (None if part is None else part.to(dtype) for part in (h, B, bias))
    if transpose:
        return _times_rows(x.to(dtype), weight, h, B, bias, out_dtype or x.dtype)
    out = _times_columns(x, weight, dtype)
    if h is not None and B is not None:
        out.addmm_(h.to(out.dtype), B.to(out.dtype))
    return out.to(out_dtype or x.dtype)


def on_paper_matmul(x: Tensor, weight: PackedWeight, transpose: bool) -> Tensor:
    """``matmul`` as an operator that is not looked into: for tensors without numbers, whose codes cannot be looked up."""
    product: Tensor = _product(x, *_flatten(weight), transpose=transpose)
    return product


def takes_kernels(x: Tensor, weight: PackedWeight, backend: str | None) -> bool:
    """Whether the Triton kernels take this product. Raises ``ConfigError`` for a backend that does not exist."""
    if backend is None:
        return cuda.available(weight, x)
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}: wanted None or one of {', '.join(map(repr, BACKENDS))}")
    return backend == "triton"


def _times_rows(x: Tensor, weight: Tensor | PackedWeight, h: Tensor | None, B: Tensor | None, bias: Tensor | None,
                out_dtype: torch.dtype) -> Tensor:  # fmt: skip
    """``x W^T + h B^T + bias``; one slice of the output after the other, where the weight must be decoded or cast."""
    if isinstance(weight, Tensor) and weight.dtype == x.dtype == out_dtype:
        out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        return out if h is None or B is None else out.addmm_(h, B.t())
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    for first, last, block in _row_blocks(weight, x.dtype, len(x)):
        part = out[:, first:last] if out_dtype == x.dtype else buffer("part", (len(x), last - first), x.device, x.dtype)
        if bias is None:
            torch.mm(x, block.t(), out=part)
        else:
            torch.addmm(bias[first:last], x, block.t(), out=part)
        if h is not None and B is not None:
            part.addmm_(h, B[first:last].t())
        if out_dtype != x.dtype:
            out[:, first:last] = part
    return out


def _times_columns(x: Tensor, weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """``x W``; a sum over several slices is kept in at least fp32, or it would be rounded once a slice."""
    out: Tensor | None = None
    for first, last, block in _row_blocks(weight, dtype, len(x)):
        part = x[:, first:last].to(dtype)
        if out is None and last == len(x.T):
            return part @ block
        if out is None:
            out = (part @ block).to(torch.promote_types(dtype, torch.float32))
        elif out.dtype == dtype:
            out.addmm_(part, block)
        else:
            out.add_(part @ block)
    return x.new_zeros(x.shape[0], weight.shape[1], dtype=dtype) if out is None else out


def buffer(name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Room for a slice: reused on a CPU, where fresh pages cost more than the work; elsewhere the allocator does that."""
    if (page := paper.get()) is not None:
        return page.buffer(name, math.prod(shape), device, dtype).view(*shape)
    if device.type == "cpu":
        return scratch(name, math.prod(shape), dtype).view(*shape)
    return torch.empty(*shape, dtype=dtype, device=device)


def _row_blocks(weight: Tensor | PackedWeight, dtype: torch.dtype, count: int) -> Iterator[tuple[int, int, Tensor]]:
    """``(first row, last row, those rows in dtype)`` of a weight, in a buffer that is reused; a dense one of that dtype comes whole."""
    rows, columns = weight.shape
    if isinstance(weight, Tensor) and weight.dtype == dtype:
        yield 0, rows, weight
        return
    size = 1 if isinstance(weight, Tensor) else weight.unit
    step = size // math.gcd(size, columns)  # rows after which a block ends with a row
    step *= max(1, min(_ROWS, _ROWS_FEW if count <= _FEW else _ROWS) // (step * columns))
    decode = None if isinstance(weight, Tensor) else weight.decoder()
    for first in range(0, rows, step):
        last = min(first + step, rows)
        if decode is None:
            yield first, last, _cast_rows(weight[first:last], dtype)  # type: ignore[index]
            continue
        decoded = buffer("rows", (last - first, columns), weight.packed.device, torch.float32)  # type: ignore[union-attr]
        decode(first * columns, decoded.view(-1))
        yield first, last, decoded if dtype == decoded.dtype else _cast_rows(decoded, dtype)


def _cast_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in another dtype, laid out as they are (Conv1D's lie transposed)."""
    if rows.stride(0) == 1 and rows.stride(1) != 1:
        return _cast_rows(rows.t(), dtype).t()
    return buffer("cast", rows.shape, rows.device, dtype).copy_(rows)


@torch.library.custom_op("minilora::dequantize", mutates_args=())
def _dense(packed: Tensor, absmax: Tensor | None, nested: Tensor | None, offset: Tensor | None, format: str, levels: list[float],
           unit: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    return _gather(packed, absmax, nested, offset, format, levels, unit, rows, columns).dequantize(dtype)


@_dense.register_fake
def _(packed: Tensor, absmax: Tensor | None, nested: Tensor | None, offset: Tensor | None, format: str, levels: list[float],
      unit: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    return packed.new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("minilora::quant_matmul", mutates_args=())
def _product(x: Tensor, packed: Tensor, absmax: Tensor | None, nested: Tensor | None, offset: Tensor | None, format: str,
             levels: list[float], unit: int, rows: int, columns: int, transpose: bool, bias: Tensor | None = None,
             backend: str | None = None) -> Tensor:  # fmt: skip
    """``x W^T + bias`` (``transpose``; ``[M, columns]`` to ``[M, rows]``) or ``x W`` (``[M, rows]`` to ``[M, columns]``)."""
    weight = _gather(packed, absmax, nested, offset, format, levels, unit, rows, columns)
    with torch.autocast(x.device.type, enabled=False):
        return matmul(x, weight, transpose, bias=bias, backend=backend)


@_product.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor | None, nested: Tensor | None, offset: Tensor | None, format: str,
      levels: list[float], unit: int, rows: int, columns: int, transpose: bool, bias: Tensor | None = None,
      backend: str | None = None) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], rows if transpose else columns)


def _keep_packed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, packed, absmax, nested, offset, *ctx.rest, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, absmax, nested, offset)


def _backward(ctx, grad: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    *rest, transpose = ctx.rest
    dx = _product(grad.contiguous(), *ctx.saved_tensors, *rest, not transpose, backend=ctx.backend)
    return dx, *[None] * 10, None if ctx.bias_dtype is None else bias_gradient(grad, ctx.bias_dtype), None


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient ``[out]`` of a bias, from that of the output ``[M, out]``; summed in at least fp32."""
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)


_product.register_autograd(_backward, setup_context=_keep_packed)
