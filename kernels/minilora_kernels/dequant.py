"""``nf4_dequant``: the dense weight, or some of its rows, in one launch, double quantization included.

Equal to the bit to bitsandbytes and to ``minilora.quantize``: scale = level * nested scale + offset with two roundings, then fp32 level x
fp32 scale, rounded once to the result's dtype; so the compiler may fuse nothing. Moves bits/8 + 4/blocksize bytes in and 2 or 4 out for
each weight, and is bound by that. Next file: ``linear.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.launch import on
from minilora_kernels.lookup import levels_of, load_scales, load_shift
from minilora_kernels.weight import NESTED_BLOCKSIZE, Weight, table

WEIGHTS = 4096  # decoded by one program
BUFFER = 512 << 20  # bytes of dense rows held at a time by the products that decode first


def scales_reference(w: Weight) -> Tensor:
    """fp32 scales ``[blocks]``, decoded from 8 bits where they are stored so."""
    if not w.nested:
        return w.absmax
    spread = w.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: w.absmax.numel()]
    return w.nested_levels[w.absmax.int()] * spread + w.nested_offset


def dequant_reference(w: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[N, K]``: level x scale in fp32, rounded to ``dtype`` (fp64: exact)."""
    shifts = torch.arange(8 - w.bits, -1, -w.bits, device=w.packed.device, dtype=torch.int32)
    codes = (w.packed.view(-1, 1).int() >> shifts & (2**w.bits - 1)).flatten()[: math.prod(w.shape)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    levels = torch.tensor(w.levels, dtype=torch.float32, device=w.packed.device)[codes].to(exact)
    scales = scales_reference(w).to(exact).repeat_interleave(w.blocksize)[: levels.numel()]
    return (levels * scales).view(w.shape).to(dtype)


@triton.jit
def dequant_kernel(packed, absmax, code2, absmax2, offset, levels, out, first, count, limit,
                   SB: tl.constexpr, BITS: tl.constexpr, NESTED: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """``out[i] = level * scale`` for the weights ``first .. first + count``; ``first`` is a multiple of ``SB``.

    One program decodes ``T`` weights as ``T / WIDTH`` parts of blocks. ``limit``: bytes of ``packed`` from ``first``.
    """
    WIDTH: tl.constexpr = min(SB, T)
    PARTS: tl.constexpr = T // WIDTH
    PER: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * T
    part = tl.arange(0, PARTS)
    inside = start + part * WIDTH < count
    shift = load_shift(offset, NESTED)
    block = (first + start + part * WIDTH) // SB
    scales = load_scales(absmax, code2, absmax2, shift, tl.where(inside, block, 0), NESTED)
    byte = part[:, None] * (WIDTH // PER) + tl.arange(0, WIDTH // PER)[None, :]
    codes = tl.load(packed + first // PER + start // PER + byte, mask=start // PER + byte < limit, other=0)
    values = levels_of(codes, levels, BITS, PARTS, WIDTH) * scales[:, None]
    place = part[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + start + place, values.to(out.dtype.element_ty), mask=start + place < count)


def nf4_dequant(
    w: Weight, dtype: torch.dtype, rows: tuple[int, int] | None = None, out: Tensor | None = None
) -> Tensor:
    """The dense weight, or its rows ``rows[0] .. rows[1] - 1``.

    Args:
        dtype: bf16, fp16 or fp32. rows: must begin where a block begins (see ``row_step``); default all.
        out: contiguous memory of at least the rows' size and that dtype, written instead of new memory.

    Returns:
        ``[rows, K]``.
    """
    begin, end = rows or (0, w.shape[0])
    columns, count = w.shape[1], (end - begin) * w.shape[1]
    first = begin * columns
    if first % w.blocksize:
        raise ValueError(f"rows: found a start at weight {first} / wanted a multiple of the blocksize {w.blocksize}")
    out = torch.empty(count, dtype=dtype, device=w.packed.device) if out is None else out.view(-1)[:count]
    limit = w.packed.numel() - first * w.bits // 8
    levels = table(w.levels, torch.float32, str(w.packed.device), "load").levels
    with on(w.packed):
        dequant_kernel[(triton.cdiv(count, WEIGHTS),)](
            **w.pointers(), levels=levels, out=out, first=first, count=count, limit=limit,
            SB=w.blocksize, BITS=w.bits, NESTED=w.nested, T=WEIGHTS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out.view(end - begin, columns)


def row_step(w: Weight) -> int:
    """Rows after which a row begins with a block again."""
    return w.blocksize // math.gcd(w.blocksize, w.shape[1])


def row_slices(w: Weight, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """``(first, last, dense rows)`` over the whole weight, through one buffer of at most ``BUFFER`` bytes (or ``row_step`` rows)."""
    step = row_step(w)
    step *= max(1, BUFFER // (dtype.itemsize * w.shape[1] * step))
    step = min(step, w.shape[0])
    buffer = torch.empty(step * w.shape[1], dtype=dtype, device=w.packed.device)
    for first in range(0, w.shape[0], step):
        last = min(first + step, w.shape[0])
        yield first, last, nf4_dequant(w, dtype, (first, last), buffer)
