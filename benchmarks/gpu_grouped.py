"""The products with a stack of experts in ``make gpu``: checked against float64, and timed beside dense ones. Run by ``gpu.py``.

No GPU has run these kernels yet. Timed is an even division of the rows, since only then has the library one product for all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks import DEVICE, HALF, INTERPRET, LIMIT, Check, differing, draw, error, poisoned, weight
from gpu_timing import RANK, SCALE, Card, Cells, material, timed
from torch import Tensor

import minilora_kernels as mk

EXPERTS, SHAPE, EACH = (3, (64, 128), [5]) if INTERPRET else (64, (1024, 2048), [1, 16, 128, 512])
BOTH = {
    "linear": (True, mk.grouped_linear, mk.grouped_linear_reference),
    "dgrad": (False, mk.grouped_dgrad, mk.grouped_dgrad_reference),
}


def ends(rows: list[int]) -> Tensor:
    return torch.tensor(rows).cumsum(0).to(DEVICE, torch.int32)


def check_grouped() -> Iterator[Check]:
    """Experts with many rows, few and none, and three rows that are nobody's, which hold NaN; with and without a low-rank part."""
    divisions = [[7, 0, 20]] if INTERPRET else [[0, 300, 1, 0, 77, 16, 0, 5], [9] * 64, [0, 0, 2049, 0]]
    ways = [(True, 16, HALF), (False, 0, HALF if INTERPRET else torch.float16)]
    n, k = (64, 128) if INTERPRET else (576, 1024)
    for rows in divisions:
        for name, (forward, call, reference) in BOTH.items():
            for nested, r, dtype in ways:
                w, experts, count = weight(len(rows) * n, k, nested=nested), len(rows), sum(rows) + 3
                x = draw(count, k if forward else n, dtype=dtype)
                x[-3:] = float("nan")
                shape = (experts, n, r) if forward else (experts, r, k)
                low = (draw(count, r, dtype=dtype), draw(*shape, dtype=torch.float32)) if r else ()
                with poisoned():
                    got = call(x, w, experts, ends(rows), *low, path="fused")
                want = reference(x.double(), w, experts, ends(rows), *(part.double() for part in low))
                yield f"grouped {name}, rows {str(rows)[:30]} r{r} {dtype}", error(got, want), LIMIT[dtype]
    if not INTERPRET:
        yield from check_graph(n, k)


def check_graph(n: int, k: int) -> Iterator[Check]:
    """One captured graph serves every division of the rows."""
    w = weight(8 * n, k)
    for name, (forward, call, _) in BOTH.items():
        x, offs = draw(200, k if forward else n), ends([25] * 8)
        call(x, w, 8, offs, path="fused")  # compiles, uploads tables
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x, w, 8, offs, path="fused")
        for rows in ([0, 100, 3, 0, 80, 0, 17, 0], [0, 0, 0, 0, 0, 0, 0, 200], [1] * 8):
            offs.copy_(ends(rows))
            graph.replay()
            torch.cuda.synchronize()
            again = call(x, w, 8, ends(rows), path="fused")
            yield f"grouped {name} from a CUDA graph, rows {rows}: differing", differing(out, again), 0


def methods(
    w: mk.Weight, dense: Tensor, x: Tensor, h: Tensor, factor: Tensor, offs: Tensor, forward: bool
) -> dict[str, Callable[[], Tensor]]:
    """The ways to take one product of ``x [E * each, in]``; those of the library as a batch of ``E``."""
    call = mk.grouped_linear if forward else mk.grouped_dgrad

    def product(stack: Tensor) -> Tensor:
        whole = stack.view(EXPERTS, *SHAPE)
        return torch.bmm(x.view(EXPERTS, -1, x.shape[1]), whole.mT if forward else whole)

    def sequence() -> Tensor:
        low = h.view(EXPERTS, -1, RANK)
        return product(mk.nf4_dequant(w, x.dtype)).baddbmm_(low, factor.mT if forward else factor)

    return {
        "bf16 product": lambda: product(dense),
        "kernel": lambda: call(x, w, EXPERTS, offs, path="fused"),
        "kernel with low rank": lambda: call(x, w, EXPERTS, offs, h, factor, path="fused"),
        "sequence with low rank": sequence,
    }


def cells(card: Card, make: Callable[..., mk.Weight]) -> Cells:
    """As ``gpu_timing.cells``; ``M`` are the rows of all experts together, ``N`` and ``K`` the size of one."""
    n, k = SHAPE
    weights, dense = material(card, EXPERTS * n, k, make)
    for each in EACH:
        for forward in (True, False):
            yield f"{EXPERTS} experts {n}x{k}, {each} rows each", lambda: measure(card, weights, dense, each, forward)  # noqa: B023


def measure(
    card: Card, weights: list[mk.Weight], dense: list[Tensor], each: int, forward: bool
) -> list[dict[str, Any]]:
    """All methods for one division of the rows, as rows of the table."""
    (n, k), m, offs = SHAPE, EXPERTS * each, ends([each] * EXPERTS)
    x, h = draw(m, k if forward else n, dtype=card.dtype), SCALE * draw(m, RANK, dtype=card.dtype)
    factor = 0.02 * draw(EXPERTS, *((n, RANK) if forward else (RANK, k)), dtype=card.dtype)
    ways = [methods(w, dense[i % len(dense)], x, h, factor, offs, forward) for i, w in enumerate(weights)]
    low = 2 * m * RANK * (n if forward else k)  # h is given
    return timed(card, ways, "grouped forward" if forward else "grouped dgrad", (n, k, m), low, EXPERTS)
