"""The thin products beside the wide one: ``lora_down`` (xa = s x A^T), ``lora_bwd_b`` (s dy B and dB), ``lora_bwd_a`` (dA).

They do almost no arithmetic, so each is as fast as its one wide input is read: x, dy, x. ``lora_bwd_b`` takes both of its results
from a single reading of dy. Ranks are padded to 16, 32 or 64 inside; larger ranks are for the library. Next file: ``partials.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora_kernels import launch
from minilora_kernels.launch import on, padded_rank, splits
from minilora_kernels.partials import total

ROWS, COLUMNS = 64, 64  # of a tile of the wide input


def lora_down_reference(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """``scale * x A^T``: ``[M, K]``, ``[r, K]`` to ``[M, r]``."""
    return scale * (x @ a.to(x.dtype).T)


def lora_bwd_b_reference(dy: Tensor, b: Tensor, xa: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``(scale * dy B [M, r], dB = dy^T xa [N, r])``; ``xa`` has its scale in it already."""
    return scale * (dy @ b.to(dy.dtype)), dy.T @ xa.to(dy.dtype)


def lora_bwd_a_reference(dyb: Tensor, x: Tensor) -> Tensor:
    """``dA = dyb^T x``: ``[M, r]``, ``[M, K]`` to ``[r, K]``."""
    return dyb.to(x.dtype).T @ x


@triton.jit
def down_kernel(x, a, out, scale, M, K, r, span, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """Part ``program_id(1)`` of ``scale * x A^T`` for ``BM`` rows: the columns ``span`` wide."""
    tl.assume(span >= BK)
    CT: tl.constexpr = x.dtype.element_ty
    m, i, part = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, R), tl.program_id(1)
    live, rank = (m < M)[:, None], (i < r)[None, :]
    base = x + m.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, R), tl.float32)
    for start in range(0, span, BK):
        k = part * span + start + tl.arange(0, BK)
        wide = tl.load(base + k[None, :], mask=live & (k < K)[None, :], other=0.0)
        thin = tl.load(a + i[None, :] * K + k[:, None], mask=rank & (k < K)[:, None], other=0.0)
        acc = tl.dot(wide, thin.to(CT), acc, input_precision="ieee")
    place = out + (part.to(tl.int64) * M + m)[:, None] * r + i[None, :]
    tl.store(place, (acc * scale).to(out.dtype.element_ty), mask=live & rank)


@triton.jit
def bwd_b_kernel(dy, b, xa, dyb, db, M, N, r, span, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr):
    """For ``BM`` rows and ``span`` columns of dy: a part of dy B, and of dB = dy^T xa what these rows give."""
    tl.assume(span >= BN)
    CT: tl.constexpr = dy.dtype.element_ty
    m, i, part = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, R), tl.program_id(1)
    live, rank = (m < M)[:, None], (i < r)[None, :]
    base = dy + m.to(tl.int64)[:, None] * N
    low = tl.load(xa + m[:, None] * r + i[None, :], mask=live & rank, other=0.0).to(CT)
    acc = tl.zeros((BM, R), tl.float32)
    for start in range(0, span, BN):
        n = part * span + start + tl.arange(0, BN)
        here = (n < N)[:, None] & rank
        wide = tl.load(base + n[None, :], mask=live & (n < N)[None, :], other=0.0)
        thin = tl.load(b + n[:, None] * r + i[None, :], mask=here, other=0.0)
        acc = tl.dot(wide, thin.to(CT), acc, input_precision="ieee")
        grad = tl.dot(tl.trans(wide), low, input_precision="ieee")
        tl.store(db + (tl.program_id(0).to(tl.int64) * N + n)[:, None] * r + i[None, :], grad, mask=here)
    tl.store(dyb + (part.to(tl.int64) * M + m)[:, None] * r + i[None, :], acc, mask=live & rank)


@triton.jit
def bwd_a_kernel(dyb, x, da, M, K, r, span, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """For ``BK`` columns of x and ``span`` of its rows: a part of dA = dyb^T x."""
    tl.assume(span >= BM)
    CT: tl.constexpr = x.dtype.element_ty
    k, i, part = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, R), tl.program_id(1)
    rank, there = i < r, (k < K)[None, :]
    acc = tl.zeros((R, BK), tl.float32)
    for start in range(0, span, BM):
        m = part * span + start + tl.arange(0, BM)
        wide = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < M)[:, None] & there, other=0.0)
        thin = tl.load(dyb + m[:, None] * r + i[None, :], mask=(m < M)[:, None] & rank[None, :], other=0.0)
        acc = tl.dot(tl.trans(thin.to(CT)), wide, acc, input_precision="ieee")
    tl.store(da + (part * r + i)[:, None] * K + k[None, :], acc, mask=rank[:, None] & there)


def _span(size: int, parts: int, tile: int) -> int:
    """Columns of each of ``parts`` parts: whole tiles, the last may run over the end."""
    return triton.cdiv(triton.cdiv(size, parts), tile) * tile


def lora_down(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """``scale * x A^T``.

    Args:
        x: ``[M, K]`` bf16 or fp16. a: ``[r, K]`` in any float dtype.

    Returns:
        ``[M, r]`` in ``x``'s dtype.
    """
    (m, k), r, inside = x.shape, a.shape[0], padded_rank(a.shape[0])
    if inside is None:
        return lora_down_reference(x, a, scale)
    rows = triton.cdiv(m, ROWS)
    parts = splits(launch.arch_of(x.device), rows, triton.cdiv(k, 4 * COLUMNS))
    out = torch.empty(parts, m, r, dtype=torch.float32 if parts > 1 else x.dtype, device=x.device)
    if m == 0:
        return out[0].to(x.dtype)
    with on(x):
        down_kernel[(rows, parts)](
            x.contiguous(), a.contiguous(), out, 1.0 if parts > 1 else float(scale), m, k, r, _span(k, parts, COLUMNS),
            BM=ROWS, BK=COLUMNS, R=inside, num_warps=4, num_stages=4, enable_fp_fusion=True,
        )  # fmt: skip
    return total(out, x.dtype, scale) if parts > 1 else out[0]


def lora_bwd_b(dy: Tensor, b: Tensor, xa: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``scale * dy B`` and dB in one pass over dy.

    Args:
        dy: ``[M, N]`` bf16 or fp16. b: ``[N, r]``. xa: ``[M, r]`` with its scale in it.

    Returns:
        ``[M, r]`` in ``dy``'s dtype, and dB ``[N, r]`` in ``b``'s. Partial sums of ``M / 64 * N * r`` fp32 are held meanwhile.
    """
    (m, n), r, inside = dy.shape, b.shape[1], padded_rank(b.shape[1])
    if inside is None:
        dyb, db = lora_bwd_b_reference(dy, b, xa, scale)
        return dyb, db.to(b.dtype)
    rows = triton.cdiv(m, ROWS)
    parts = splits(launch.arch_of(dy.device), rows, triton.cdiv(n, 4 * COLUMNS))
    dyb = torch.empty(parts, m, r, dtype=torch.float32, device=dy.device)
    db = torch.empty(rows, n, r, dtype=torch.float32, device=dy.device)
    if m == 0:
        return dyb[0].to(dy.dtype), torch.zeros_like(b)
    with on(dy):
        bwd_b_kernel[(rows, parts)](
            dy.contiguous(), b.contiguous(), xa.contiguous(), dyb, db, m, n, r, _span(n, parts, COLUMNS),
            BM=ROWS, BN=COLUMNS, R=inside, num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return total(dyb, dy.dtype, scale), total(db, b.dtype)


def lora_bwd_a(dyb: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``dA = dyb^T x``.

    Args:
        dyb: ``[M, r]`` with the scale in it. x: ``[M, K]`` bf16 or fp16. dtype: of the result; default ``x``'s.

    Returns:
        ``[r, K]``.
    """
    (m, k), r, inside, dtype = x.shape, dyb.shape[1], padded_rank(dyb.shape[1]), dtype or x.dtype
    if inside is None:
        return lora_bwd_a_reference(dyb, x).to(dtype)
    if m == 0:
        return torch.zeros(r, k, dtype=dtype, device=x.device)
    columns = triton.cdiv(k, COLUMNS)
    parts = splits(launch.arch_of(x.device), columns, triton.cdiv(m, 4 * ROWS))
    da = torch.empty(parts, r, k, dtype=torch.float32, device=x.device)
    with on(x):
        bwd_a_kernel[(columns, parts)](
            dyb.contiguous(), x.contiguous(), da, m, k, r, _span(m, parts, ROWS),
            BM=ROWS, BK=COLUMNS, R=inside, num_warps=4, num_stages=4, enable_fp_fusion=True,
        )  # fmt: skip
    return total(da, dtype)
