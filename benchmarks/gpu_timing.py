"""Timings of the kernels on a GPU, beside what else computes the same. Run by ``gpu.py``.

Times are medians of device events around calls replayed from a CUDA graph, so that launching is not what is measured. Weights are cold: as
many copies as exceed twice the second-level cache are walked round. Rank 16, double-quantized scales, and for each product its floor: the
larger of bytes over the measured copy bandwidth and operations over the measured rate of a large product.
"""

from __future__ import annotations

import csv
import functools
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import minilora_kernels as mk

Size = tuple[int, int, int]  # N, K, M
Cells = Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]
RANK, SCALE = 16, 2.0
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # N, K
ROWS = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
FIELDS = [
    "pass",
    "N",
    "K",
    "M",
    "method",
    "us",
    "floor_us",
    "share_of_floor",
    "TFLOPs",
    "GBps",
    "against_bf16",
    "against_sequence",
]


@dataclass(frozen=True)
class Card:
    """What was measured of the card itself."""

    device: str
    dtype: torch.dtype
    bandwidth: float  # bytes a second, of a copy, read and write counted
    rate: float  # operations a second, of a large product
    cache: int  # bytes


def seconds(calls: list[Callable[[], Any]], device: str, repeats: int = 11) -> float:
    """Median time of one call; ``calls`` are done one after the other in every repeat."""
    if device == "cpu":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    for call in calls:  # compiles, uploads tables, and lets the libraries allocate
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def ceilings(device: str, dtype: torch.dtype) -> Card:
    """Copy bandwidth and the rate of a large product, measured here and now."""
    size, side = (1 << 16, 64) if device == "cpu" else (1 << 29, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds([lambda: target.copy_(source)], device)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = seconds([lambda: a @ b], device)
    cache = 0 if device == "cpu" else getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    return Card(device, dtype, 2 * size / copy, 2 * side**3 / product, cache)


def low_rank(m: int, wide: int, out: int, card: Card) -> tuple[Tensor, Tensor, Tensor]:
    """``(input, first factor [r, wide], second factor [out, r])``; a few tens of MB at most."""
    x, down, up = torch.randn(m, wide), torch.randn(RANK, wide) * 0.02, torch.randn(out, RANK) * 0.02
    return x.to(card.device, card.dtype), down.to(card.device, card.dtype), up.to(card.device, card.dtype)


def methods(
    w: mk.Weight, dense: Tensor, x: Tensor, down: Tensor, up: Tensor, forward: bool
) -> dict[str, Callable[[], Tensor]]:
    """The ways to take one product. Backward: x is dy, ``down`` is B^T, ``up`` is A^T."""
    few = forward and mk.gemv_fits(w, x.shape[0])
    taken = mk.nf4_gemv if few else mk.nf4_linear if forward else mk.nf4_dgrad
    fused = taken if few else functools.partial(taken, path="fused")
    decoded = functools.partial(mk.nf4_linear if forward else mk.nf4_dgrad, path="dequant")
    second = up if forward else up.T.contiguous()

    def sequence() -> Tensor:
        whole = mk.nf4_dequant(w, x.dtype)
        out = x @ (whole.T if forward else whole)
        return out.addmm_(x @ down.T, up.T, alpha=SCALE)

    return {
        "bf16 product": lambda: x @ (dense.T if forward else dense),
        "kernel": lambda: fused(x, w),
        "kernel with low rank": lambda: fused(x, w, mk.lora_down(x, down, SCALE), second),
        "decoded first, with low rank": lambda: decoded(x, w, mk.lora_down(x, down, SCALE), second),
        "as chosen, with low rank": lambda: taken(x, w, mk.lora_down(x, down, SCALE), second),
        "sequence with low rank": sequence,
    }


def material(card: Card, n: int, k: int, make: Callable[..., mk.Weight]) -> tuple[list[mk.Weight], list[Tensor]]:
    """Copies of a weight that exceed the cache twice, packed and dense."""

    def copies(size: float) -> int:
        return max(1, min(12, int(2 * card.cache / size) + 1))

    weights = [make(n, k, seed=i) for i in range(copies(stored_bytes(n, k)))]
    return weights, [mk.nf4_dequant(w, card.dtype) for w in weights[: copies(2 * n * k)]]


def stored_bytes(n: int, k: int) -> float:
    """Codes, 8-bit scales and their scales."""
    return n * k * (0.5 + 1 / 64 + 4 / 64 / 256)


def measure(card: Card, weights: list[mk.Weight], dense: list[Tensor], m: int, forward: bool) -> list[dict[str, Any]]:
    """All methods for one product, as rows of the table."""
    n, k = weights[0].shape
    x, down, up = low_rank(m, k if forward else n, n if forward else k, card)
    ways = [methods(w, dense[i % len(dense)], x, down, up, forward) for i, w in enumerate(weights)]
    low = 2 * m * RANK * (n + k)
    return timed(card, ways, "forward" if forward else "dgrad", (n, k, m), low)


def timed(
    card: Card, ways: list[dict[str, Callable[[], Tensor]]], which: str, size: Size, low: int, experts: int = 1
) -> list[dict[str, Any]]:
    """Rows of the table for one product.

    Args:
        ways: for every copy of the weight the methods by name. which: the product's name. size: ``N``, ``K`` and ``M``.
        low: operations of a low-rank part. experts: how many weights of ``N`` x ``K`` are read.
    """
    (n, k, m), rows = size, []
    for name in ways[0]:
        taken = seconds([way[name] for way in ways], card.device)
        moved = experts * (2 * n * k if name == "bf16 product" else stored_bytes(n, k)) + 2 * m * (n + k)
        done = 2 * m * n * k + (low if "low rank" in name else 0)
        floor = max(moved / card.bandwidth, done / card.rate)
        row = {"pass": which, "N": n, "K": k, "M": m, "method": name, "us": taken * 1e6}
        rates = {"TFLOPs": done / taken / 1e12, "GBps": moved / taken / 1e9}
        rows.append(row | {"floor_us": floor * 1e6, "share_of_floor": floor / taken} | rates)
    times = {row["method"]: row["us"] for row in rows}
    for row in rows:
        row["against_bf16"] = times["bf16 product"] / row["us"]
        row["against_sequence"] = times["sequence with low rank"] / row["us"] if "low rank" in row["method"] else ""
    return rows


def dequant_row(card: Card, weights: list[mk.Weight]) -> dict[str, Any]:
    """Decoding a whole weight, against copy bandwidth."""
    n, k = weights[0].shape
    taken = seconds([lambda w=w: mk.nf4_dequant(w, card.dtype) for w in weights], card.device)
    moved = stored_bytes(n, k) + 2 * n * k
    row = {"pass": "dequant", "N": n, "K": k, "M": "", "method": "kernel", "us": taken * 1e6}
    share = {"floor_us": moved / card.bandwidth * 1e6, "share_of_floor": moved / card.bandwidth / taken}
    return row | share | {"GBps": moved / taken / 1e9}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10)
        return found.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def written(row: dict[str, Any]) -> dict[str, Any]:
    """The row with four digits to a number, without what it does not have."""
    kept = {key: row[key] for key in FIELDS if row.get(key, "") != ""}
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in kept.items()}


def cells(card: Card, make: Callable[..., mk.Weight]) -> Cells:
    """What is measured, in order: ``(name, the call that gives its rows)``."""
    shapes, many = ([(128, 128)], [1, 70]) if card.device == "cpu" else (SHAPES, ROWS)
    for n, k in shapes:
        weights, dense = material(card, n, k, make)
        yield f"dequant {n}x{k}", lambda: [dequant_row(card, weights)]  # noqa: B023
        for m in many:
            for forward in (True, False):
                yield f"{n}x{k} M{m}", lambda: measure(card, weights, dense, m, forward)  # noqa: B023


def run(
    out: Path,
    minutes: float,
    device: str,
    dtype: torch.dtype,
    make: Callable[..., mk.Weight],
    more: Callable[..., Cells],
) -> bool:
    """Measures what fits into the time, writes each row as it comes; False if a kernel failed or time ran out.

    ``make`` makes a packed weight; ``more`` gives further cells, which follow those above.
    """
    start, good, rows = time.time(), True, []
    name = "interpreter" if device == "cpu" else torch.cuda.get_device_name()
    card = ceilings(device, dtype)
    rates = f"copy {card.bandwidth / 1e9:.0f} GB/s, product {card.rate / 1e12:.0f} TFLOP/s"
    versions = (
        f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}, commit {commit()}"
    )
    print(f"--- timing\n{name}: {rates}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {name}; {rates}; {versions}; rank {RANK}, double-quantized scales, medians of 11\n")
        table = csv.DictWriter(file, FIELDS, restval="")
        table.writeheader()
        for what, call in itertools.chain(cells(card, make), more(card, make)):
            if (time.time() - start) / 60 > minutes:
                print(f"SKIP  timings from {what} on: no time left", flush=True)
                good = False
                break
            try:
                found = call()
            except Exception as problem:
                print(f"FAIL  timing of {what}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
                good = False
                continue
            rows += found
            for row in found:
                table.writerow(written(row))
                print("  ".join(f"{key} {value}" for key, value in written(row).items()), flush=True)
            file.flush()
    print(f"written: {path}")
    print_goals(rows)
    return good


def print_goals(rows: list[dict[str, Any]]) -> None:
    """What was hoped for on an H100 against what came out; no goal fails the command."""
    by = {(row["pass"], row["N"], row["K"], row["M"], row["method"]): row for row in rows}
    for (which, n, k, m, method), row in by.items():
        if which == "dequant":
            print(f"goal  dequant at 90 % of copy bandwidth: {row['share_of_floor']:.0%}")
        elif which == "forward" and method == "kernel" and m in (1, 16):
            print(
                f"goal  forward {n}x{k} M{m} at 65 % of its floor, 2.3 x bf16: {row['share_of_floor']:.0%}, {row['against_bf16']:.2f} x"
            )
        elif method == "as chosen, with low rank" and m in (512, 1024, 4096):
            print(
                f"goal  {which} {n}x{k} M{m} at {1.0 if m == 4096 else 1.3} x the sequence: {row['against_sequence']:.2f} x"
            )
