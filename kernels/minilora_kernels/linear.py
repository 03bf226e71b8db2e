"""``nf4_linear``: out = x W^T + xa B^T + bias, W decoded in registers, the low-rank product in the same accumulator.

The product is taken transposed, out^T = W x^T: the decoded weight is then the *left* operand, which tensor cores of Hopper take from
registers, so that decoding the next tile can overlap with multiplying this one; x is the right one, from shared memory. (The compiler still
exchanges the decoded weight between threads through shared memory once: four stores and loads a thread and tile.) Reads x once for each
column of tiles, W (0.56 bytes a weight with fp32 scales at blocksize 64, 4 bits) once for each row of tiles, writes out once; nothing
dense is held. Next file: ``dgrad.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import launch
from minilora_kernels.dequant import dequant_reference, row_slices
from minilora_kernels.launch import GROUP, LINEAR, Tile, on, padded_rank, pick
from minilora_kernels.lookup import decode, load_scales, load_shift, load_words
from minilora_kernels.weight import Weight, decoding


def linear_reference(
    x: Tensor, w: Weight, xa: Tensor | None = None, b: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``[M, K]`` to ``[M, N]`` in ``x``'s dtype, the definition."""
    out = x @ dequant_reference(w, x.dtype).T
    out = out if xa is None else out + xa @ b.to(x.dtype).T
    return out if bias is None else out + bias.to(x.dtype)


@triton.jit
def tile_of(program, across, down, GROUP: tl.constexpr):
    """Numbers of a program's tile: ``GROUP`` columns of tiles are walked together, down first."""
    width = GROUP * down
    group = program // width
    size = min(across - group * GROUP, GROUP)
    return (program % width) // size, group * GROUP + program % size


@triton.jit
def linear_tile(x, packed, absmax, code2, absmax2, offset, words, levels, xa, b, bias, out, inverse, N, K, r,
                row_m, rows, strip, column,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
                LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """One tile ``[BM, BN]`` of out: rows ``row_m .. row_m + min(rows, BM)``, columns from ``column`` on, by rows of W from ``strip`` on.

    ``strip`` is ``column``, or in a stack of weights (``grouped.py``) as far into one of them. ``K`` is a multiple of ``BK`` and of ``SB``.
    """
    CT: tl.constexpr = x.dtype.element_ty
    PER: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = BK // min(SB, BK)
    tl.assume(K >= BK)  # a loop that may be empty makes ptxas serialise the tensor cores (its warning C7515)
    # Offsets inside a tile fit 32 bits; those of the tile itself need not. Rows beyond the end read the last one and are not stored.
    m, n = tl.arange(0, BM), tl.minimum(tl.arange(0, BN), N - 1 - column)
    row_w, row_n = strip.to(tl.int64), column.to(tl.int64)
    live = m < rows
    x_tile = x + row_m * K + m[:, None] * K + tl.arange(0, BK)[None, :]
    w_tile = packed + row_w * (K // PER) + n[:, None] * (K // PER) + tl.arange(0, BK // PER)[None, :]
    block = (strip + n)[:, None] * (K // SB)
    within = tl.arange(0, GROUPS)[None, :] * min(SB, BK)
    table, shift = load_words(words, LOOKUP), load_shift(offset, NESTED)
    acc = tl.zeros((BN, BM), tl.float32)
    if R > 0:
        i = tl.arange(0, R)
        left = tl.load(b + (row_w + n)[:, None] * r + i[None, :], mask=(i < r)[None, :], other=0.0).to(CT)
        right = tl.load(xa + (row_m + m)[:, None] * r + i[None, :], mask=live[:, None] & (i < r)[None, :], other=0.0)
        acc = tl.dot(left, tl.trans(right.to(CT)), acc, input_precision="ieee")
    for k in range(0, K, BK):
        values = tl.load(x_tile + k, mask=live[:, None], other=0.0)
        codes = tl.load(w_tile + k // PER)
        scales = load_scales(absmax, code2, absmax2, shift, block + (k + within) // SB, NESTED) * inverse
        weights = decode(codes, scales, table, levels, LOOKUP, BITS, True, CT, BN, GROUPS, BK)
        acc = tl.dot(weights, tl.trans(values), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + row_n + n).to(tl.float32)[:, None]
    place = out + row_m * N + row_n + m[:, None] * N + tl.arange(0, BN)[None, :]
    keep = live[:, None] & (tl.arange(0, BN) < N - column)[None, :]
    tl.store(place, tl.trans(acc.to(CT)), mask=keep)


@triton.jit
def linear_kernel(x, packed, absmax, code2, absmax2, offset, words, levels, xa, b, bias, out, inverse, M, N, K, r,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
                  LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """A program for each tile of out; ``M`` and ``N`` are free."""
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    linear_tile(x, packed, absmax, code2, absmax2, offset, words, levels, xa, b, bias, out, inverse, N, K, r,
                (pm * BM).to(tl.int64), M - pm * BM, pn * BN, pn * BN,
                BM, BN, BK, SB, BITS, LOOKUP, NESTED, R, BIAS)  # fmt: skip


def linear_fits(w: Weight, tile: Tile) -> bool:
    """Whether the fused kernel can take this weight: rows of whole tiles and whole blocks."""
    return w.shape[1] % max(tile.BK, w.blocksize) == 0


def nf4_linear(x: Tensor, w: Weight, xa: Tensor | None = None, b: Tensor | None = None, bias: Tensor | None = None,
           path: str | None = None, tile: Tile | None = None) -> Tensor:  # fmt: skip
    """``x W^T + xa B^T + bias``.

    Args:
        x: ``[M, K]`` bf16 or fp16 (fp32: decoded first, then the library's product). w: ``[N, K]``.
        xa, b: ``[M, r]`` in any float dtype, scaled already, and ``[N, r]``; both or neither. bias: ``[N]``.
        path: "fused" or "dequant" forces one; default fused where the shape divides and it is faster. tile: instead of the table's.

    Returns:
        ``[M, N]`` in ``x``'s dtype. Allocates it and, on the dequant path, the dense weight or 512 MB of it. Never waits for the device.
    """
    (m, k), n, arch = x.shape, w.shape[0], launch.arch_of(x.device)
    tile = tile or pick([t for t in LINEAR[arch] if linear_fits(w, t)] or LINEAR[arch], arch, m, n, "BN")
    fused = linear_fits(w, tile) and (x.dtype != torch.float32 or arch == "cpu")
    if path == "fused" and not fused:
        raise ValueError(
            f"path='fused': found K={k}, blocksize {w.blocksize}, {x.dtype} / wanted whole tiles of {tile.BK}"
        )
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    if path == "dequant" or not fused or (path is None and not launch.fused_wins(arch, m, True)):
        return _decoded_first(x, w, xa, b, bias, out)
    r = 0 if xa is None else xa.shape[1]
    inside, x = padded_rank(r), x.contiguous()
    with on(x):
        linear_kernel[(triton.cdiv(m, tile.BM) * triton.cdiv(n, tile.BN),)](
            x, **decoding(w, x, arch), xa=x if not inside else xa.contiguous(), b=x if not inside else b.contiguous(),
            bias=x if bias is None else bias, out=out, M=m, N=n, K=k, r=r, R=inside or 0, BIAS=bias is not None,
            GROUP=GROUP, **tile.options(),
        )  # fmt: skip
    return out if inside is not None else out.addmm_(xa.to(x.dtype), b.to(x.dtype).T)


def _decoded_first(
    x: Tensor, w: Weight, xa: Tensor | None, b: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    """The same with dense rows in a buffer, all of them where they fit, and the library's product."""
    for first, last, rows in row_slices(w, x.dtype):
        torch.mm(x, rows.T, out=out[:, first:last])
    if xa is not None:
        out.addmm_(xa.to(x.dtype), b.to(x.dtype).T)
    return out if bias is None else out.add_(bias.to(x.dtype))
