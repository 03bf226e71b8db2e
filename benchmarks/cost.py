"""Does the cost grow with the work, or with its square? Each task is done at n and at 4n; four times the work may take five times as long.

    python benchmarks/cost.py [--quick] [--out benchmarks/results/cost.csv]

Seconds are processor time of this process, the least of the rounds: other work on the machine makes a round slower, never quicker.
What must not depend on n at all (a mixed batch among more loaded adapters) has 1 as its ideal ratio and 5 as its limit too.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, stamp, write_csv
from torch import nn

import minilora
from minilora import LoraConfig
from minilora.many.adapted import count_parameters
from minilora.quant.finite import is_finite

LIMIT = 5.0
Call = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """``prepare(n)`` makes what is needed and returns the call that is timed; ``full`` and ``quick`` are n of the smaller size.

    ``again``: the call may be repeated.
    """

    name: str
    unit: str
    full: int
    quick: int
    prepare: Callable[[int], Call]
    again: bool = False


class Block(nn.Module):
    """The linear layers of a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(self.q_proj(x).tanh() * self.k_proj(x) + self.v_proj(x))
        return x + self.down_proj(self.up_proj(x).relu())


def model(layers: int, width: int) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(layers))).eval()


def rows(count: int) -> nn.ModuleDict:
    """That many linear layers and nothing else."""
    torch.manual_seed(0)
    return nn.ModuleDict({"rows": nn.ModuleList(nn.Linear(16, 16) for _ in range(count))}).eval()


def paths(count: int) -> list[str]:
    return [f"rows.{number}" for number in range(count)]


def lora(targets: list[str] | None = None, **fields: Any) -> LoraConfig:
    chosen = targets or ["q_proj", "v_proj"]
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": chosen, "init_lora_weights": False, **fields})


def loaded(adapters: int, layers: int = 4, width: int = 64) -> Any:
    made = minilora.get_peft_model(model(layers, width), lora(), "a0")
    for number in range(1, adapters):
        made.add_adapter(f"a{number}", lora())
    return made


def add(n: int) -> Call:
    made = loaded(1)

    def call() -> None:
        for number in range(n):
            made.add_adapter(f"n{number}", lora())

    return call


def mix(n: int) -> Call:
    made, x = loaded(n, layers=8, width=256), torch.randn(8, 4, 256)
    names = [f"a{n // 4 * number}" for number in range(4)] * 2

    @torch.no_grad()
    def call() -> None:
        made(x, adapter_names=names)

    return call


def patterns(n: int) -> Call:
    ranks = {path: 1 + number % 3 for number, path in enumerate(paths(n))}
    config, made = lora(paths(n), rank_pattern=ranks, alpha_pattern=ranks), rows(n)
    return lambda: minilora.inject(made, config)


def switch(n: int) -> Call:
    made, turn = loaded(n), iter(range(1_000_000))
    return lambda: made.set_adapter(f"a{next(turn) % 2}")


def finite(n: int) -> Call:
    weight = torch.randn(n).bfloat16()
    return lambda: is_finite(weight)


def merging(n: int) -> Call:
    made = minilora.inject(rows(n), lora(paths(n)))
    return lambda: minilora.merge(made)


def unmerging(n: int) -> Call:
    made = minilora.inject(rows(n), lora(paths(n)))
    minilora.merge(made)
    return lambda: minilora.unmerge(made)


def deleting(n: int) -> Call:
    made = loaded(n + 1)
    return lambda: [made.delete_adapter(f"a{number}") for number in range(n)]


def counting(n: int) -> Call:
    made = loaded(n)
    return lambda: count_parameters(made)


TASKS = [
    Task("add adapters one by one, width 64, 4 layers", "adapters", 2500, 50, add),
    Task("mixed batch of 4 adapters, 8 layers of width 256", "loaded", 32, 8, mix, again=True),
    Task("switch, 4 layers", "loaded", 250, 10, switch, again=True),
    Task("count parameters, 4 layers", "loaded", 250, 10, counting, again=True),
    Task("delete adapters one by one, 4 layers", "adapters", 500, 10, deleting),
    Task("merge", "layers", 1250, 40, merging),
    Task("unmerge", "layers", 1250, 40, unmerging),
    Task("inject by name, a rank for each layer", "patterns", 600, 20, patterns),
    Task("NaN and infinity, bf16", "weights", 4_000_000, 100_000, finite, again=True),
]


def seconds(task: Task, n: int, rounds: int) -> float:
    """Processor time of one call, the least of the rounds."""
    found = []
    for _ in range(rounds):
        call = task.prepare(n)
        if task.again:
            call()
        gc.collect()
        began, count = time.process_time(), 0
        while True:
            call()
            count += 1
            if not task.again or time.process_time() - began > 0.1:
                break
        found.append((time.process_time() - began) / count)
    return min(found)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    print(f"{'':50}{'n':>10}{'ms at n':>12}{'at 4n':>12}{'ratio':>8}")
    for task in TASKS:
        n = task.quick if quick else task.full
        small, large = (seconds(task, size, 1 if quick else 3) for size in (n, 4 * n))
        print(f"{task.name:50}{n:10}{1000 * small:12.2f}{1000 * large:12.2f}{large / small:8.2f}", flush=True)
        yield {
            "task": task.name,
            "n": n,
            "unit": task.unit,
            "ms": round(1000 * small, 3),
            "ms at 4n": round(1000 * large, 3),
            "ratio": round(large / small, 2),
            "goal": f"<= {LIMIT:g}",
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds instead of minutes")
    parser.add_argument("--out", default=str(RESULTS / "cost.csv"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = list(run(arguments.quick))
    write_csv(Path(arguments.out), table, stamp())
    print(arguments.out)
    return 0 if arguments.quick or all(row["ratio"] <= LIMIT for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
