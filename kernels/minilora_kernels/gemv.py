"""``nf4_gemv``: out = x W^T + xa B^T + bias for up to 64 rows, which is what decoding asks for.

Bound by reading W once (0.56 bytes a weight, fp32 scales, blocksize 64), so many small programs read it at the same time: each takes 128
rows of W and a share of its columns, and the shares are added afterwards in a fixed order. Rows are padded to 16, 32 or 64.
The scale is applied after a block's product, in fp32: the only rounding of a weight is that of the 16-entry table.
Next file: ``quantize.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import launch
from minilora_kernels.launch import GEMV, on, padded_rank, splits
from minilora_kernels.linear import linear_reference as gemv_reference
from minilora_kernels.lookup import decode, load_scales, load_shift, load_words
from minilora_kernels.partials import total
from minilora_kernels.weight import Weight, decoding

__all__ = ["gemv_fits", "gemv_reference", "nf4_gemv"]

MOST_ROWS = 64


@triton.jit
def gemv_kernel(x, packed, absmax, code2, absmax2, offset, words, levels, xa, b, out, inverse, M, N, K, r,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
                LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Part ``program_id(1)`` of ``SPLIT`` of a tile ``[BM, BN]``: every ``SPLIT``-th group of ``BK`` columns. fp32 ``[SPLIT, M, N]``."""
    CT: tl.constexpr = x.dtype.element_ty
    PER: tl.constexpr = 8 // BITS
    tl.static_assert(BK <= SB)
    pn, part = tl.program_id(0), tl.program_id(1)
    m, n = tl.arange(0, BM), tl.minimum(tl.arange(0, BN), N - 1 - pn * BN)
    row_n = (pn * BN).to(tl.int64)
    live = (m < M)[:, None]
    x_tile = x + m[:, None] * K + tl.arange(0, BK)[None, :]
    w_tile = packed + row_n * (K // PER) + n[:, None] * (K // PER) + tl.arange(0, BK // PER)[None, :]
    block = (pn * BN + n)[:, None] * (K // SB)
    table, shift = load_words(words, LOOKUP), load_shift(offset, NESTED)
    acc = tl.zeros((BN, BM), tl.float32)
    if R > 0:  # only the first part has a low-rank product
        i = tl.arange(0, R)
        mine = (i < tl.where(part == 0, r, 0))[None, :]
        left = tl.load(b + (row_n + n)[:, None] * r + i[None, :], mask=mine, other=0.0).to(CT)
        right = tl.load(xa + m[:, None] * r + i[None, :], mask=live & mine, other=0.0).to(CT)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    for k in range(part * BK, K, BK * SPLIT):
        rows = tl.load(x_tile + k, mask=live, other=0.0)
        codes = tl.load(w_tile + k // PER)
        scales = load_scales(absmax, code2, absmax2, shift, block + k // SB, NESTED) * inverse
        weights = decode(codes, scales, table, levels, LOOKUP, BITS, False, CT, BN, 1, BK)
        acc += tl.dot(weights, tl.trans(rows), input_precision="ieee") * scales
    place = out + (part.to(tl.int64) * M + m)[:, None] * N + row_n + tl.arange(0, BN)[None, :]
    tl.store(place, tl.trans(acc), mask=live & (tl.arange(0, BN) < N - pn * BN)[None, :])


def gemv_fits(w: Weight, rows: int) -> bool:
    """Whether the kernel can take this product: up to 64 rows, whole blocks in a row of the weight, none smaller than a tile."""
    return rows <= MOST_ROWS and w.shape[1] % w.blocksize == 0 and w.blocksize >= 64


def nf4_gemv(x: Tensor, w: Weight, xa: Tensor | None = None, b: Tensor | None = None, bias: Tensor | None = None,
         parts: int | None = None) -> Tensor:  # fmt: skip
    """``x W^T + xa B^T + bias`` for few rows; arguments and result as ``nf4_linear``. Only where ``gemv_fits``.

    Args:
        x: ``[M <= 64, K]`` bf16 or fp16. parts: into how many the sum over ``K`` is split, a power of two; default by the device.
    """
    (m, k), n, arch = x.shape, w.shape[0], launch.arch_of(x.device)
    tile = next(tile for tile in GEMV[arch] if m <= tile.BM)
    strips = triton.cdiv(n, tile.BN)
    parts = parts or splits(arch, strips, k // tile.BK)
    r = 0 if xa is None else xa.shape[1]
    inside, x = padded_rank(r), x.contiguous()
    out = torch.empty(parts, m, n, dtype=torch.float32, device=x.device)
    with on(x):
        gemv_kernel[(strips, parts)](
            x, **decoding(w, x, arch), xa=x if not inside else xa.contiguous(), b=x if not inside else b.contiguous(),
            out=out, M=m, N=n, K=k, r=r, R=inside or 0, SPLIT=parts, **tile.options(),
        )  # fmt: skip
    result = total(out, x.dtype, 1.0, bias)
    return result if inside is not None else result.addmm_(xa.to(x.dtype), b.to(x.dtype).T)
