"""Products with a quantized weight on a GPU: the one module that knows the Triton kernels, and only when it is asked for one.

    if cuda.available(weight, x):
        out = cuda.matmul(x, weight, transpose=True, h=xa, B=lora_B, bias=bias)

``matmul`` is what ``ops`` calls inside its operators for tensors on a GPU, forward (``transpose=True``) and backward (``False``); it
has no gradient of its own. Nothing in it waits for the device, and it allocates its result only (and sums of parts), so it may be captured
in a CUDA graph after one call outside of it, which compiles the kernel and uploads the tables. ``grouped`` is the same for the experts of a
mixture, each row by its own expert's weight. Next file: ``linear/ops.py``.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minilora.errors import MissingPackageError, QuantizationError
from minilora.quant.codebooks import dynamic_map
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.weight import PackedWeight


@functools.lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """``minilora_kernels``, imported when first asked for; None where Triton is not installed."""
    try:
        import minilora_kernels
    except ImportError:
        return None
    return minilora_kernels


def available(weight: PackedWeight, x: Tensor) -> bool:
    """Whether ``matmul`` can take this product.

    It can if both lie on one CUDA device that the kernels know (Ampere and newer, MI300), the codes have 4 or 2 bits, ``x`` is bf16, fp16
    or fp32, and Triton is installed. Any shape will do: what does not divide into tiles is decoded in slices first.
    """
    return len(weight.shape) == 2 and _known(weight, x)


def grouped_available(weight: QuantizedTensor, x: Tensor) -> bool:
    """Whether ``grouped`` can take this product: as ``available``, for ``[E, out, in]`` of which no block of scales crosses an expert."""
    return len(weight.shape) == 3 and math.prod(weight.shape[1:]) % weight.blocksize == 0 and _known(weight, x)


def _known(weight: PackedWeight, x: Tensor) -> bool:
    if not x.is_cuda or x.device != weight.packed.device or not _has_codes(weight):
        return False
    found = kernels()
    return found is not None and bool(found.supported(x.device, x.dtype))


def matmul(x: Tensor, weight: PackedWeight, transpose: bool, h: Tensor | None = None, B: Tensor | None = None,
           bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """A product with the packed weight, a low-rank product in the same accumulator.

    Args:
        x: ``[M, in]`` with ``transpose``, else ``[M, out]``.
        weight: quantized ``[out, in]``, 4 or 2 bits.
        transpose: True: ``x W^T + h B^T + bias`` (forward: h = scaling * x A^T, B = lora_B). False: ``x W + h B`` (the gradient of the
            input: x = dy, h = scaling * dy lora_B, B = lora_A).
        h: ``[M, r]`` or None, scaled already. B: ``[out, r]`` with ``transpose``, else ``[r, in]``; any float dtype.
        bias: ``[out]`` or None; only with ``transpose``. out_dtype: of the result; default ``x``'s.

    Returns:
        ``[M, out]`` with ``transpose``, else ``[M, in]``. The reference is ``x @ weight.dequantize(x.dtype).T + h @ B.T + bias``, without
        ``.T`` for False; its bf16 result is met to the rounding of the weights.

    Raises:
        MissingPackageError: Triton is not installed. QuantizationError: the codes have neither 4 nor 2 bits, or are no codes.
    """
    found = _kernels_for(weight)
    packed = kernel_weight(weight)  # type: ignore[arg-type]
    if not transpose:
        out = found.nf4_dgrad(x, packed, h, B)
    elif x.dtype != torch.float32 and found.gemv_fits(packed, x.shape[0]):
        out = found.nf4_gemv(x, packed, h, B, bias)
    else:
        out = found.nf4_linear(x, packed, h, B, bias)
    return out if out_dtype is None else out.to(out_dtype)


def grouped(x: Tensor, weight: QuantizedTensor, offs: Tensor, transpose: bool, h: Tensor | None = None, B: Tensor | None = None,
            out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``matmul`` with a weight for each expert of a mixture: rows ``offs[e-1] .. offs[e]`` are expert e's.

    Args:
        x: ``[S, in]`` with ``transpose``, else ``[S, out]``; sorted by expert.
        weight: quantized ``[E, out, in]``, 4 or 2 bits, ``out * in`` a multiple of the blocksize.
        offs: int32 ``[E]`` on ``x``'s device, ascending; where each expert's rows end. Rows from ``offs[-1]`` on are not read, and zero.
        transpose, h, out_dtype: as in ``matmul``. B: ``[E, out, r]`` with ``transpose``, else ``[E, r, in]``.

    Returns:
        ``[S, out]`` with ``transpose``, else ``[S, in]``. It waits for the device, to read ``offs``, only where no kernel fits: fp32 input,
        a rank over 64, a weight that does not divide into tiles (64 columns and whole blocks; for the gradient also 64 rows).

    Raises:
        MissingPackageError: Triton is not installed. QuantizationError: the codes have neither 4 nor 2 bits, or the weight is no stack
        as above. ValueError: another size does not fit the weight's.
    """
    found = _kernels_for(weight)
    if len(weight.shape) != 3 or math.prod(weight.shape[1:]) % weight.blocksize:
        raise QuantizationError(
            f"the weight is {tuple(weight.shape)} with blocks of {weight.blocksize}; wanted [experts, out, in] with whole blocks for every "
            "expert, let PyTorch decode"
        )
    product = found.grouped_linear if transpose else found.grouped_dgrad
    out = product(x, kernel_weight(weight), weight.shape[0], offs, h, B)
    return out if out_dtype is None else out.to(out_dtype)


def _has_codes(weight: PackedWeight) -> bool:
    return isinstance(weight, QuantizedTensor) and weight.book.bits in (2, 4)


def _kernels_for(weight: PackedWeight) -> ModuleType:
    """The kernels, or an error that says why there are none for this weight."""
    found = kernels()
    if found is None:
        raise MissingPackageError(
            "the kernels need Triton, which is not installed; pip install triton, or let PyTorch decode"
        )
    if not isinstance(weight, QuantizedTensor):
        raise QuantizationError(
            f"{weight.format} blocks are GGUF's; the kernels take codes of 4 or 2 bits, let PyTorch decode"
        )
    if weight.book.bits not in (2, 4):
        raise QuantizationError(
            f"format {weight.book.name!r} has {weight.book.bits} bits; the kernels take 4 or 2, let PyTorch decode"
        )
    return found


def kernel_weight(weight: QuantizedTensor) -> Any:
    """The same memory as a ``minilora_kernels.Weight``; the experts of a stack one below the other."""
    nested = weight.nested_absmax is not None
    return kernels().Weight(  # type: ignore[union-attr]
        weight.packed,
        weight.absmax,
        weight.book.levels,
        (math.prod(weight.shape[:-1]), weight.shape[-1]),
        weight.blocksize,
        _nested_levels(weight.packed.device) if nested else None,
        weight.nested_absmax,
        weight.nested_offset,
    )


@functools.lru_cache(maxsize=16)
def _nested_levels(device: torch.device) -> Tensor:
    """The levels of double-quantized scales on a device, uploaded once."""
    return dynamic_map().to(device)
