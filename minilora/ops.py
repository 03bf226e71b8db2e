"""The only door to speed: products with a quantized weight, as torch custom operators.

``quant_linear(x, weight, bias)`` is ``F.linear(x, weight.dequantize(x.dtype), bias)``; that line (``quant_linear_reference``) defines
it. The operator never holds the dense weight whole: rows are decoded into a small buffer that is reused, multiplied, and forgotten,
and the backward pass decodes the same packed bytes again (``dx = dy W``; QLoRA section 3), so nothing dense is saved for it.

Being registered operators, they pass through ``torch.compile`` without a graph break. There is no second derivative.
Next file: ``adapted.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.codebooks import Codebook
from minilora.errors import QuantizationError
from minilora.lookup import scratch
from minilora.quantize import QuantizedTensor, decode_range

_ROWS = 1 << 20  # weights decoded at a time for a product: 4 MB of fp32


def quant_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with a quantized ``W``.

    Args:
        x: ``[..., in]``, fp32, bf16 or fp16.
        weight: quantized ``[out, in]``.
        bias: ``[out]`` or None; trains if it requires grad.

    Returns:
        ``[..., out]`` in ``x``'s dtype. Differentiable once with respect to ``x`` and ``bias``.

    Raises:
        QuantizationError: the weight is not 2-D or ``x`` does not end in its ``in``.
    """
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise QuantizationError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}; wanted [..., in]"
        )
    out: Tensor = _product(x.reshape(-1, x.shape[-1]), *_flatten(weight), transpose=True).view(
        *x.shape[:-1], weight.shape[0]
    )
    return out if bias is None else out + bias.to(out.dtype)


def quant_linear_reference(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """What ``quant_linear`` means, in one line; dense, slow, differentiable by torch itself."""
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def _flatten(weight: QuantizedTensor) -> tuple:
    """A quantized tensor as the plain arguments that an operator can take."""
    nested, offset = weight.nested_absmax, weight.nested_offset
    return weight.packed, weight.absmax, nested, offset, list(weight.book.levels), weight.blocksize, *weight.shape


@functools.lru_cache(maxsize=32)
def _book(levels: tuple[float, ...]) -> Codebook:
    return Codebook("operator", levels, "passed to an operator")


def _gather(packed: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, levels: list[float],
            blocksize: int, rows: int, columns: int) -> QuantizedTensor:  # fmt: skip
    shape = torch.Size((rows, columns))
    return QuantizedTensor(packed, absmax, shape, torch.float32, _book(tuple(levels)), blocksize, nested, offset)


@functools.lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; without, torch's bf16 products are 8 to 100 times slower than fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In what the product is taken: bf16 only where the processor has it, fp16 never on a CPU; otherwise as given."""
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not cpu_has_bf16())
    return torch.float32 if x.device.type == "cpu" and slow else x.dtype


def _row_blocks(weight: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """``(first row, last row, decoded rows)``: slices of the weight that start on a block, in a buffer that is reused."""
    rows, columns = weight.shape
    step = weight.blocksize // math.gcd(weight.blocksize, columns)  # rows after which a block ends with a row
    step *= max(1, _ROWS // (step * columns))
    scales = weight.scales()
    for first in range(0, rows, step):
        last = min(first + step, rows)
        count = (last - first) * columns
        buffer = (
            scratch("rows", count, torch.float32)
            if scales.device.type == "cpu"
            else torch.empty(count, device=scales.device)
        )
        decode_range(weight, scales, first * columns, buffer)
        yield first, last, buffer.view(last - first, columns).to(dtype)


@torch.library.custom_op("minilora::quant_matmul", mutates_args=())
def _product(x: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, levels: list[float],
             blocksize: int, rows: int, columns: int, transpose: bool) -> Tensor:  # fmt: skip
    """``x W^T`` (``transpose``; ``[M, columns]`` to ``[M, rows]``) or ``x W`` (``[M, rows]`` to ``[M, columns]``)."""
    dtype = _compute_dtype(x)
    weight, values = _gather(packed, absmax, nested, offset, levels, blocksize, rows, columns), x.to(dtype)
    if transpose:
        out = values.new_empty(x.shape[0], rows)
        for first, last, block in _row_blocks(weight, dtype):
            torch.mm(values, block.t(), out=out[:, first:last])
    else:  # a sum over slices is kept in at least fp32, or it would be rounded once a slice
        out = values.new_zeros(x.shape[0], columns, dtype=torch.promote_types(dtype, torch.float32))
        for first, last, block in _row_blocks(weight, dtype):
            if out.dtype == dtype:
                out.addmm_(values[:, first:last], block)
            else:
                out.add_(values[:, first:last] @ block)
    return out.to(x.dtype)


@_product.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, levels: list[float],
      blocksize: int, rows: int, columns: int, transpose: bool) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], rows if transpose else columns)


def _keep_packed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, packed, absmax, nested, offset, *ctx.rest = inputs
    ctx.save_for_backward(packed, absmax, nested, offset)


def _backward(ctx, grad: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    *rest, transpose = ctx.rest
    return _product(grad.contiguous(), *ctx.saved_tensors, *rest, not transpose), *[None] * 9


_product.register_autograd(_backward, setup_context=_keep_packed)
