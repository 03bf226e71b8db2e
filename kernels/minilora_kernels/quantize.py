"""``nf4_quantize``: a dense weight to codes and absmax scales, as bitsandbytes does it, ties included.

v = x * (1 / absmax) in fp32 with an exact reciprocal (dividing gives other codes on thresholds); the code is the number of midpoints
strictly below v, so a tie goes to the lower level. In the last block, if it is ragged, bitsandbytes divides. Reads the weight once, writes
bits/8 + 4/blocksize bytes for each of its values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels.launch import on
from minilora_kernels.weight import Weight

TINY = 1e-38  # guards the reciprocal of a block of zeros
WEIGHTS = 4096  # worked on by one program


def midpoints(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 midpoints of the sorted levels, ``[n - 1]``, and the code of each cell between them, int32 ``[n]``."""
    ordered, codes = torch.tensor(levels, dtype=torch.float32, device="cpu").sort(stable=True)
    return ((ordered[1:] + ordered[:-1]) / 2).to(device), codes.to(device, torch.int32)


def quantize_reference(weight: Tensor, levels: tuple[float, ...], blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """``(packed uint8, absmax fp32)`` of a weight whose size is a multiple of the blocksize."""
    blocks = weight.reshape(-1, blocksize).float()
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.clamp(min=TINY).reciprocal().unsqueeze(1)).clamp(-1, 1)
    limits, codes = midpoints(levels, weight.device)
    code = codes[torch.bucketize(scaled, limits)]
    per = 8 // (len(levels).bit_length() - 1)
    shifts = torch.arange(per - 1, -1, -1, device=weight.device) * (8 // per)
    return (code.view(-1, per) << shifts).sum(1).to(torch.uint8), absmax


@triton.jit
def code_of(scaled, limits, codes, LEVELS: tl.constexpr):
    """The code of the nearest level: a tie goes down."""
    above = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(LEVELS - 1):
        above += (scaled > tl.load(limits + i)).to(tl.int32)
    return tl.load(codes + above)


@triton.jit
def quantize_kernel(weight, limits, codes, packed, absmax, first, count, zero, tiny,
                    SB: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """``PARTS`` blocks of ``SB`` weights from block ``first`` on; ``RAGGED``: the one block that the end cuts off.

    Places of a last byte beyond the end get the code ``zero``. ``tiny`` is an argument because a literal this small becomes a float64.
    """
    PER: tl.constexpr = 8 // BITS
    tiny = tl.cast(tiny, tl.float32)
    part = first + tl.program_id(0).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    place = part[:, None] * SB + tl.arange(0, SB)[None, :]
    keep = place < count
    values = tl.load(weight + place, mask=keep, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(values), 1)
    guarded = tl.maximum(scale, tiny)
    if RAGGED:
        scale = guarded  # as bitsandbytes stores the scale of a ragged block of zeros
        scaled = tl.div_rn(values, tl.broadcast_to(guarded[:, None], (PARTS, SB)))
    else:
        scaled = values * tl.div_rn(tl.full((PARTS,), 1.0, tl.float32), guarded)[:, None]
    tl.store(absmax + part, scale, mask=part * SB < count)
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    code = tl.where(keep, code_of(scaled, limits, codes, 1 << BITS), zero)
    weights_of = (1 << BITS * (PER - 1 - tl.arange(0, PER)))[None, None, :]
    byte = tl.sum(tl.reshape(code, (PARTS, SB // PER, PER)) * weights_of, 2)
    at = part[:, None] * (SB // PER) + tl.arange(0, SB // PER)[None, :]
    tl.store(packed + at, byte.to(tl.uint8), mask=at * PER < count)


def nf4_quantize(weight: Tensor, levels: tuple[float, ...], blocksize: int = 64) -> Weight:
    """A weight ``[N, K]``, bf16, fp16 or fp32 and finite, with fp32 absmax scales.

    Args:
        levels: 16 or 4 values in code order, sorted or not. blocksize: weights that share a scale, a power of two from 32.
    """
    bits, count = len(levels).bit_length() - 1, weight.numel()
    packed = torch.empty(-(-count * bits // 8), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(triton.cdiv(count, blocksize), dtype=torch.float32, device=weight.device)
    limits, codes = midpoints(levels, weight.device)
    zero = (
        _code_of_zero(levels) if bits == 4 else 0
    )  # what bitsandbytes fills an odd last byte with; other widths have none
    whole, parts, weight = count // blocksize, max(1, WEIGHTS // blocksize), weight.contiguous()
    shared = {"SB": blocksize, "BITS": bits, "enable_fp_fusion": False}
    with on(weight):
        if whole:
            quantize_kernel[(triton.cdiv(whole, parts),)](
                weight, limits, codes, packed, absmax, 0, whole * blocksize, zero, TINY, PARTS=parts, RAGGED=False,
                num_warps=8, **shared,
            )  # fmt: skip
        if count % blocksize:
            quantize_kernel[(1,)](
                weight, limits, codes, packed, absmax, whole, count, zero, TINY, PARTS=1, RAGGED=True,
                num_warps=max(1, min(8, blocksize // 64)), **shared,
            )  # fmt: skip
    return Weight(packed, absmax, tuple(levels), (weight.shape[0], weight.shape[1]), blocksize)


def _code_of_zero(levels: tuple[float, ...]) -> int:
    """The code that a weight of zero gets."""
    limits, codes = midpoints(levels, torch.device("cpu"))
    return int(codes[torch.bucketize(torch.zeros(1, device="cpu"), limits)])
