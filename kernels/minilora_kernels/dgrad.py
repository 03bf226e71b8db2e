"""``nf4_dgrad``: dx = dy W + dyb A from the same packed bytes that the forward pass read.

Transposed as in ``linear``: dx^T = W^T dy^T, the decoded weight in registers on the left. The scale differs along the reduction, so it
is always applied before the product. Bytes moved: as ``linear``, with dy for x and dx for out. Next file: ``grouped.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import launch
from minilora_kernels.dequant import dequant_reference, row_slices
from minilora_kernels.launch import DGRAD, GROUP, Tile, on, padded_rank, pick
from minilora_kernels.linear import tile_of
from minilora_kernels.lookup import decode, load_scales, load_shift, load_words
from minilora_kernels.weight import Weight, decoding


def dgrad_reference(dy: Tensor, w: Weight, dyb: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """``[M, N]`` to ``[M, K]`` in ``dy``'s dtype, the definition."""
    out = dy @ dequant_reference(w, dy.dtype)
    return out if dyb is None else out + dyb @ a.to(dy.dtype)


@triton.jit
def dgrad_tile(dy, packed, absmax, code2, absmax2, offset, words, levels, dyb, a, out, inverse, N, K, r,
               row_m, rows, strip, pk,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
               LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """One tile ``[BM, BK]`` of dx: number ``pk`` across, of rows ``row_m .. row_m + min(rows, BM)``, by the rows of W from ``strip`` on.

    ``strip`` is 0, or in a stack of weights (``grouped.py``) the first row of one. ``N`` is a multiple of ``BN``, ``K`` of ``BK`` and of
    ``SB``.
    """
    CT: tl.constexpr = dy.dtype.element_ty
    PER: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = BK // min(SB, BK)
    tl.assume(N >= BN)
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    live = m < rows
    dy_tile = dy + row_m * N + m[:, None] * N + n[None, :]
    first = packed + tl.cast(strip, tl.int64) * (K // PER) + pk * (BK // PER)
    w_tile = first + n[:, None] * (K // PER) + tl.arange(0, BK // PER)[None, :]
    block = (strip + n)[:, None] * (K // SB) + (pk * BK + tl.arange(0, GROUPS)[None, :] * min(SB, BK)) // SB
    table, shift = load_words(words, LOOKUP), load_shift(offset, NESTED)
    acc = tl.zeros((BK, BM), tl.float32)
    if R > 0:
        i = tl.arange(0, R)
        left = tl.load(a + i[:, None] * K + pk * BK + k[None, :], mask=(i < r)[:, None], other=0.0).to(CT)
        right = tl.load(dyb + (row_m + m)[:, None] * r + i[None, :], mask=live[:, None] & (i < r)[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), tl.trans(right.to(CT)), acc, input_precision="ieee")
    for start in range(0, N, BN):
        values = tl.load(dy_tile + start, mask=live[:, None], other=0.0)
        codes = tl.load(w_tile + tl.cast(start, tl.int64) * (K // PER))
        scales = load_scales(absmax, code2, absmax2, shift, block + start * (K // SB), NESTED) * inverse
        weights = decode(codes, scales, table, levels, LOOKUP, BITS, True, CT, BN, GROUPS, BK)
        acc = tl.dot(tl.trans(weights), tl.trans(values), acc, input_precision="ieee")
    place = out + row_m * K + pk * BK + m[:, None] * K + k[None, :]
    tl.store(place, tl.trans(acc.to(CT)), mask=live[:, None])


@triton.jit
def dgrad_kernel(dy, packed, absmax, code2, absmax2, offset, words, levels, dyb, a, out, inverse, M, N, K, r,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
                 LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """A program for each tile of dx; ``M`` is free."""
    pm, pk = tile_of(tl.program_id(0), tl.cdiv(K, BK), tl.cdiv(M, BM), GROUP)
    dgrad_tile(dy, packed, absmax, code2, absmax2, offset, words, levels, dyb, a, out, inverse, N, K, r,
               (pm * BM).to(tl.int64), M - pm * BM, 0, pk,
               BM, BN, BK, SB, BITS, LOOKUP, NESTED, R)  # fmt: skip


def dgrad_fits(w: Weight, tile: Tile, experts: int = 1) -> bool:
    """Whether the fused kernel can take this weight, or stack of ``experts``: whole tiles both ways, rows of whole blocks."""
    rows, columns = w.shape[0] // experts, w.shape[1]
    return rows % tile.BN == 0 and columns % tile.BK == 0 and columns % w.blocksize == 0


def nf4_dgrad(dy: Tensor, w: Weight, dyb: Tensor | None = None, a: Tensor | None = None,
          path: str | None = None, tile: Tile | None = None) -> Tensor:  # fmt: skip
    """``dy W + dyb A``, the gradient of ``linear``'s input.

    Args:
        dy: ``[M, N]`` bf16 or fp16 (fp32: decoded first). w: ``[N, K]``. path, tile: as in ``linear``.
        dyb, a: ``[M, r]``, scaled already, and ``[r, K]``; both or neither.

    Returns:
        ``[M, K]`` in ``dy``'s dtype.
    """
    (m, n), k, arch = dy.shape, w.shape[1], launch.arch_of(dy.device)
    tile = tile or pick([t for t in DGRAD[arch] if dgrad_fits(w, t)] or DGRAD[arch], arch, m, k, "BK")
    fused = dgrad_fits(w, tile) and (dy.dtype != torch.float32 or arch == "cpu")
    if path == "fused" and not fused:
        raise ValueError(
            f"path='fused': found W {w.shape}, blocksize {w.blocksize}, {dy.dtype} / wanted whole tiles {tile}"
        )
    if path == "dequant" or not fused or m == 0 or (path is None and not launch.fused_wins(arch, m, False)):
        return _decoded_first(dy, w, dyb, a)
    out = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    r = 0 if dyb is None else dyb.shape[1]
    inside, dy = padded_rank(r), dy.contiguous()
    with on(dy):
        dgrad_kernel[(triton.cdiv(m, tile.BM) * triton.cdiv(k, tile.BK),)](
            dy, **decoding(w, dy, arch), dyb=dy if not inside else dyb.contiguous(), a=dy if not inside else a.contiguous(),
            out=out, M=m, N=n, K=k, r=r, R=inside or 0, GROUP=GROUP, **tile.options(),
        )  # fmt: skip
    return out if inside is not None else out.addmm_(dyb.to(dy.dtype), a.to(dy.dtype))


def _decoded_first(dy: Tensor, w: Weight, dyb: Tensor | None, a: Tensor | None) -> Tensor:
    """The same with dense rows in a buffer; a sum over several of them is kept in fp32, or it would be rounded once a buffer."""
    total = torch.zeros((), dtype=torch.float32, device=dy.device)
    for first, last, rows in row_slices(w, dy.dtype):
        part = dy[:, first:last] @ rows
        if last - first == w.shape[0]:
            return part if dyb is None else part.addmm_(dyb.to(dy.dtype), a.to(dy.dtype))
        total = total + part
    if dyb is not None:
        total += dyb.to(dy.dtype) @ a.to(dy.dtype)
    return total.to(dy.dtype)
