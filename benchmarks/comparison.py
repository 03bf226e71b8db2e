"""One comparison: what was sampled of each side in turns, the ratio that it gives, and its line of the CSV file."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Setting:
    """Rounds and sizes of a run."""

    rounds: int = 5
    quick: bool = False

    def layers(self, full: int) -> int:
        return min(full, 1) if self.quick else full


@dataclass
class Sample:
    """Seconds (or bytes) of every round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, cpu: float, wall: float) -> None:
        self.cpu.append(cpu)
        self.wall.append(wall)

    def time(self, call: Callable[[], Any], count: int = 1) -> Any:
        """Add the seconds that one of ``count`` calls takes; returns the last result."""
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count):
            result = call()
        self.add((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count)
        return result


@dataclass
class Row:
    """One comparison: ``kind`` says what the ratio is.

    "time": peer / ours. "overhead": (peer - its floor) / (ours - our floor). "bytes": ours / peer, the smaller the better.
    """

    name: str
    goal: str
    kind: str
    samples: dict[str, Sample]
    note: str = ""

    def ratio(self, clock: str = "cpu") -> float:
        middle = {name: statistics.median(getattr(sample, clock)) for name, sample in self.samples.items()}
        if self.kind == "time":
            return middle["peer"] / middle["ours"]
        if self.kind == "bytes":
            return middle["ours"] / middle["peer"]
        cost = middle["ours"] - middle["floor"]  # lost in the noise if it is not positive
        return (middle["peer"] - middle["peer floor"]) / cost if cost > 0 else math.inf

    def reached(self) -> bool:
        wanted = float(self.goal.split()[1])
        return self.ratio() <= wanted if self.goal.startswith("<=") else self.ratio() >= wanted


def interleave(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Sample]:
    """Every variant in turn, ``rounds`` times, after one call that is not counted; short ones several times a round."""
    inner = {}
    for name, call in variants.items():
        call()
        began = time.perf_counter()
        call()
        inner[name] = max(1, min(200, int(0.02 / max(time.perf_counter() - began, 1e-6))))
    samples = {name: Sample() for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].time(call, inner[name])
    return samples


def fresh_process(program: str) -> str:
    """What a Python program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def csv_line(row: Row, threads: int) -> dict[str, Any]:
    """A row as a line of the CSV file; times in ms, bytes in MB."""
    unit = 1e-6 if row.kind == "bytes" else 1e3
    line: dict[str, Any] = {
        "what": row.name,
        "setting": row.note,
        "threads": threads,
        "kind": row.kind,
        "unit": "MB" if row.kind == "bytes" else "ms",
    }
    for name in ("ours", "peer", "floor", "peer floor"):
        for clock in ("cpu", "wall"):
            values = [value * unit for value in getattr(row.samples[name], clock)] if name in row.samples else []
            for said, choose in (("median", statistics.median), ("min", min), ("max", max)):
                line[f"{name} {clock} {said}"] = f"{choose(values):.5g}" if values else ""
    line |= {
        "rounds": len(row.samples["ours"].cpu),
        "ratio cpu": f"{row.ratio():.3g}",
        "ratio wall": f"{row.ratio('wall'):.3g}",
    }
    return line | {"goal": row.goal, "reached": row.reached()}
