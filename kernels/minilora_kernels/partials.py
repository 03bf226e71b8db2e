"""The second half of a split reduction: parts are added in a fixed order, so the result is the same on every run. No atomics.

Next file: ``gemv.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.launch import on


@triton.jit
def total_kernel(parts, bias, out, scale, count, columns, S, BIAS: tl.constexpr, T: tl.constexpr):
    """``out[i] = scale * sum over s of parts[s, i]``, plus ``bias[i % columns]``."""
    at = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    keep = at < count
    sums = tl.zeros((T,), tl.float32)
    for s in range(0, S):
        sums += tl.load(parts + tl.cast(s, tl.int64) * count + at, mask=keep, other=0.0)
    sums = sums * scale
    if BIAS:
        sums += tl.load(bias + at % columns, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=keep)


def total(parts: Tensor, dtype: torch.dtype, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """fp32 ``[S, rows, columns]`` to ``scale * parts.sum(0) + bias``, ``[rows, columns]`` in ``dtype``."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    with on(parts):
        total_kernel[(triton.cdiv(out.numel(), 1024),)](
            parts, parts if bias is None else bias, out, float(scale), out.numel(), out.shape[1], parts.shape[0],
            BIAS=bias is not None, T=1024, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return out
