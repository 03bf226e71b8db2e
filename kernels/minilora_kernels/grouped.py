"""``grouped_linear`` and ``grouped_dgrad``: ``linear`` and ``dgrad`` for a mixture of experts, every row by its own expert's weight.

The weights of E experts are one packed weight ``[E*N, K]``, expert e its rows ``e*N .. (e+1)*N``. Rows of the input are sorted by expert;
``offs`` holds where each expert's rows end. It stays on the device: as many programs are launched as any division of the rows could need,
each finds its expert in ``offs``, and those left over end at once. So nothing waits, a CUDA graph can hold the call, and an expert without
rows is not decoded. The tiles themselves are those of ``linear.py`` and ``dgrad.py``. Next file: ``lowrank.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import launch
from minilora_kernels.dequant import dequant_reference, nf4_dequant, row_step
from minilora_kernels.dgrad import dgrad_fits, dgrad_tile
from minilora_kernels.launch import DGRAD, GROUP, Tile, on, padded_rank, pick
from minilora_kernels.linear import linear_fits, linear_tile, tile_of
from minilora_kernels.weight import Weight, decoding


def grouped_linear_reference(
    x: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None = None, B: Tensor | None = None
) -> Tensor:
    """``[S, K]`` to ``[S, N]`` in ``x``'s dtype, the definition; rows beyond ``offs[-1]`` are nobody's, and zero."""
    dense, first = dequant_reference(w, x.dtype).view(experts, -1, w.shape[1]), 0
    out = x.new_zeros(len(x), dense.shape[1])
    for e, last in enumerate(offs.tolist()):
        rows, first = slice(first, last), last
        out[rows] = x[rows] @ dense[e].T + (0 if h is None else h[rows] @ B[e].to(x.dtype).T)
    return out


def grouped_dgrad_reference(
    dy: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None = None, A: Tensor | None = None
) -> Tensor:
    """``[S, N]`` to ``[S, K]`` in ``dy``'s dtype, the definition."""
    dense, first = dequant_reference(w, dy.dtype).view(experts, -1, w.shape[1]), 0
    out = dy.new_zeros(len(dy), w.shape[1])
    for e, last in enumerate(offs.tolist()):
        rows, first = slice(first, last), last
        out[rows] = dy[rows] @ dense[e] + (0 if h is None else h[rows] @ A[e].to(dy.dtype))
    return out


@triton.jit
def rows_of(offs, tile, S, experts, BM: tl.constexpr, SPAN: tl.constexpr):
    """``(expert, first row, rows from there to the expert's end)`` of the row tile numbered ``tile``.

    Tiles are numbered expert by expert; nobody's rows count as one expert more. ``rows`` is 0 for a number beyond all tiles. There are at
    most ``cdiv(S, BM) + experts`` tiles, since only the last of each group may be ragged. ``SPAN``: a power of two above ``experts``.
    """
    e = tl.arange(0, SPAN)
    begins = tl.load(offs + e - 1, mask=(e > 0) & (e <= experts), other=tl.where(e > 0, S, 0))
    ends = tl.load(offs + e, mask=e < experts, other=S)
    begins, ends = tl.minimum(tl.maximum(begins, 0), S), tl.minimum(tl.maximum(ends, 0), S)  # whatever is in offs
    tiles = (tl.maximum(ends - begins, 0) + BM - 1) // BM
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)  # of one group, or of none
    first = tl.sum(tl.where(mine, begins + (tile - before) * BM, 0), 0)
    return tl.sum(tl.where(mine, e, 0), 0), first, tl.sum(tl.where(mine, ends, 0), 0) - first


@triton.jit
def zero_tile(out, row, rows, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in one tile of out, whose rows are ``width`` long."""
    m, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    keep = (m < rows)[:, None] & (c < width - column)[None, :]
    tl.store(out + row * width + column + m[:, None] * width + c[None, :], 0.0, mask=keep)


@triton.jit
def grouped_linear_kernel(x, packed, absmax, code2, absmax2, offset, words, levels, h, b, offs, out, inverse, S, N, K, r, experts,
                          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
                          LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
                          GROUP: tl.constexpr):  # fmt: skip
    """A program for each tile of out that there may be. ``K`` is as in ``linear_tile``; ``S``, ``N`` and what ``offs`` says are free."""
    tile, pn = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(S, BM) + experts, GROUP)
    expert, first, rows = rows_of(offs, tile, S, experts, BM, SPAN)
    row = first.to(tl.int64)
    if (rows > 0) & (expert < experts):
        linear_tile(x, packed, absmax, code2, absmax2, offset, words, levels, h, b, x, out, inverse, N, K, r,
                    row, rows, expert * N + pn * BN, pn * BN,
                    BM, BN, BK, SB, BITS, LOOKUP, NESTED, R, False)  # fmt: skip
    elif rows > 0:
        zero_tile(out, row, rows, pn * BN, N, BM, BN)


@triton.jit
def grouped_dgrad_kernel(dy, packed, absmax, code2, absmax2, offset, words, levels, h, a, offs, out, inverse, S, N, K, r, experts,
                         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SB: tl.constexpr, BITS: tl.constexpr,
                         LOOKUP: tl.constexpr, NESTED: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
                         GROUP: tl.constexpr):  # fmt: skip
    """The same of dx. ``N`` and ``K`` are as in ``dgrad_tile``."""
    tile, pk = tile_of(tl.program_id(0), tl.cdiv(K, BK), tl.cdiv(S, BM) + experts, GROUP)
    expert, first, rows = rows_of(offs, tile, S, experts, BM, SPAN)
    row = first.to(tl.int64)
    if (rows > 0) & (expert < experts):
        dgrad_tile(dy, packed, absmax, code2, absmax2, offset, words, levels, h, a + expert.to(tl.int64) * r * K, out, inverse, N, K, r,
                   row, rows, expert * N, pk,
                   BM, BN, BK, SB, BITS, LOOKUP, NESTED, R)  # fmt: skip
    elif rows > 0:
        zero_tile(out, row, rows, pk * BK, K, BM, BK)


def grouped_linear(x: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None = None, B: Tensor | None = None,
                   path: str | None = None, tile: Tile | None = None) -> Tensor:  # fmt: skip
    """``x_e W_e^T + h_e B_e^T`` for the rows of every expert e.

    Args:
        x: ``[S, K]`` bf16 or fp16 (fp32: decoded first, then the library's product), sorted by expert. w: ``[experts * N, K]``.
        offs: int32 ``[experts]`` on ``x``'s device, ascending: expert e has the rows ``offs[e-1] .. offs[e]``, maybe none; those from
            ``offs[-1]`` on are nobody's: they are not read, and zero in the result. (What it holds is not checked where that would wait
            for the device; nothing is read or written beyond an end whatever it holds.)
        h, B: ``[S, r]`` in any float dtype, scaled already, and ``[experts, N, r]``; both or neither.
        path: "fused" or "dequant" forces one; default fused where the shape divides and ``r`` is at most 64. tile: instead of the table's.

    Returns:
        ``[S, N]`` in ``x``'s dtype. The fused path never waits for the device; the other reads ``offs``, so it does wait, cannot be
        captured in a CUDA graph, and holds one dense expert at a time.

    Raises:
        ValueError: sizes do not fit together, or "fused" is asked for what is not.
    """
    _check(x, w, experts, offs, h, B, True)
    arch, n = launch.arch_of(x.device), w.shape[0] // experts
    tiles = launch.grouped_tiles(arch)
    tile = tile or pick([t for t in tiles if linear_fits(w, t)] or tiles, arch, len(x), n, "BN", experts)
    if not _fused(x, w, h, arch, path, linear_fits(w, tile), tile):
        return _by_expert(x, w, experts, offs, h, B, True)
    out = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    if len(x):
        arguments = _arguments(x, w, experts, offs, h, arch, tile)
        with on(x):
            grouped_linear_kernel[((triton.cdiv(len(x), tile.BM) + experts) * triton.cdiv(n, tile.BN),)](
                x.contiguous(), b=x if h is None else B.contiguous(), out=out, N=n, K=w.shape[1], **arguments
            )
    return out


def grouped_dgrad(dy: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None = None, A: Tensor | None = None,
                  path: str | None = None, tile: Tile | None = None) -> Tensor:  # fmt: skip
    """``dy_e W_e + h_e A_e`` for the rows of every expert e, the gradient of ``grouped_linear``'s input.

    Args:
        dy: ``[S, N]``. w, offs, path, tile: as in ``grouped_linear``.
        h, A: ``[S, r]``, scaled already, and ``[experts, r, K]``; both or neither.

    Returns:
        ``[S, K]`` in ``dy``'s dtype. Waits and raises as ``grouped_linear``.
    """
    _check(dy, w, experts, offs, h, A, False)
    arch, (n, k) = launch.arch_of(dy.device), (w.shape[0] // experts, w.shape[1])
    tiles = [t for t in DGRAD[arch] if dgrad_fits(w, t, experts)] or DGRAD[arch]
    tile = tile or pick(tiles, arch, len(dy), k, "BK", experts)
    if not _fused(dy, w, h, arch, path, dgrad_fits(w, tile, experts), tile):
        return _by_expert(dy, w, experts, offs, h, A, False)
    out = torch.empty(len(dy), k, dtype=dy.dtype, device=dy.device)
    if len(dy):
        arguments = _arguments(dy, w, experts, offs, h, arch, tile)
        with on(dy):
            grouped_dgrad_kernel[((triton.cdiv(len(dy), tile.BM) + experts) * triton.cdiv(k, tile.BK),)](
                dy.contiguous(), a=dy if h is None else A.contiguous(), out=out, N=n, K=k, **arguments
            )
    return out


def _check(
    x: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None, factor: Tensor | None, forward: bool
) -> None:
    """Sizes, before any kernel may read beyond an end."""
    if experts < 1 or w.shape[0] % experts:
        raise ValueError(f"experts: found {experts} / wanted a divisor of the weight's {w.shape[0]} rows")
    n, k, r = w.shape[0] // experts, w.shape[1], 0 if h is None else h.shape[-1]
    wanted = {"input": (x, (len(x), k if forward else n)), "offs": (offs, (experts,))}
    if h is not None or factor is not None:
        wanted["h"] = (h, (len(x), r))
        wanted["B" if forward else "A"] = (factor, (experts, n, r) if forward else (experts, r, k))
    for name, (tensor, shape) in wanted.items():
        if tensor is None or tensor.shape != shape:
            raise ValueError(f"{name}: found {None if tensor is None else tuple(tensor.shape)} / wanted {shape}")
    if offs.dtype != torch.int32 or offs.device != x.device:
        raise ValueError(f"offs: found {offs.dtype} on {offs.device} / wanted torch.int32 on {x.device}")


def _fused(x: Tensor, w: Weight, h: Tensor | None, arch: str, path: str | None, fits: bool, tile: Tile) -> bool:
    """Whether the fused kernel takes it."""
    r = 0 if h is None else h.shape[1]
    fused = fits and padded_rank(r) is not None and (x.dtype != torch.float32 or arch == "cpu")
    if path == "fused" and not fused:
        raise ValueError(
            f"path='fused': found W {w.shape}, blocksize {w.blocksize}, rank {r}, {x.dtype} / wanted whole tiles {tile}, rank <= 64"
        )
    return fused and path != "dequant"


def _arguments(
    x: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None, arch: str, tile: Tile
) -> dict[str, Any]:
    """What both kernels take alike."""
    r = 0 if h is None else h.shape[1]
    sizes = {"S": len(x), "r": r, "experts": experts, "R": padded_rank(r), "SPAN": triton.next_power_of_2(experts + 1)}
    low = {"h": x if h is None else h.contiguous(), "offs": offs.contiguous()}
    return decoding(w, x, arch) | sizes | low | {"GROUP": GROUP} | tile.options()


def _by_expert(
    x: Tensor, w: Weight, experts: int, offs: Tensor, h: Tensor | None, factor: Tensor | None, forward: bool
) -> Tensor:
    """The same with one dense expert at a time and the library's product; waits for the device to learn ``offs``."""
    ends, n, step = offs.tolist(), w.shape[0] // experts, row_step(w)
    if ends != sorted(ends) or ends[0] < 0 or ends[-1] > len(x):
        raise ValueError(f"offs: found {ends} / wanted ascending ends of at most {len(x)} rows")
    out = torch.zeros(len(x), n if forward else w.shape[1], dtype=x.dtype, device=x.device)
    buffer = torch.empty((n + step) * w.shape[1], dtype=x.dtype, device=x.device)
    for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        if first == last:
            continue
        begin = e * n // step * step  # where a block begins, at or before the expert's first row
        dense = nf4_dequant(w, x.dtype, (begin, (e + 1) * n), buffer)[e * n - begin :]
        rows = out[first:last]
        torch.mm(x[first:last], dense.T if forward else dense, out=rows)
        if h is not None:
            own = factor[e].to(x.dtype)
            rows.addmm_(h[first:last].to(x.dtype), own.T if forward else own)
    return out
