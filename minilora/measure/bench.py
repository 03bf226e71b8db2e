"""Two libraries, one job: what was measured of each, whether they did the same, and the table that says so.

Both start from one adapter file and see the same batches in the same order, so their losses must agree; where they do not, the times mean
nothing, and the table says that first. Who runs what is in ``hf/bench.py`` and ``peers.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from minilora.report.tables import Row

__all__ = ["TOLERANCE", "Side", "agreement", "as_rows"]

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}  # nats of loss, at any step


def _warm(runs: Sequence[Sequence[float]]) -> list[float]:
    return [spent for run in runs for spent in (run[1:] or run)]


@dataclass
class Side:
    """What one library did.

    Attributes:
        name: with what it builds on. versions: by package. losses: nats per token at each step, by repeat.
        seconds: of each step, by repeat; cpu: the same in processor time, of all threads.
        peak: bytes of anonymous memory at the worst moment of any step, above the libraries; None where it cannot be measured.
        libraries: bytes of anonymous memory before the model;
            PEFT counts minilora, too. trainable: parameters. adapter: bytes on the disk.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    peak: int | None = None
    libraries: int | None = None
    trainable: int = 0
    adapter: int = 0

    @property
    def timed(self) -> list[float]:
        """Seconds of the steps that count: all but the first of each run, which warms up."""
        return sorted(_warm(self.seconds))

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.timed)


def agreement(sides: Sequence[Side], dtype: str) -> tuple[bool, str]:
    """Whether all losses of all repeats agree within the tolerance of ``dtype``, and a sentence that says how closely."""
    if len(sides) < 2:
        return True, ""
    columns = list(zip(*(run for side in sides for run in side.losses), strict=True))
    widest = max(max(column) - min(column) for column in columns)
    runs = sum(len(side.losses) for side in sides)
    if widest <= TOLERANCE[dtype]:
        return (
            True,
            f"Losses agree: {len(columns)} steps, {runs} runs, largest difference {widest:.1e} (allowed {TOLERANCE[dtype]:g}).",
        )
    return False, (
        f"LOSSES DIFFER: by {widest:.1e}, allowed {TOLERANCE[dtype]:g}; they did not do the same work, and the times do not compare."
    )


def as_rows(sides: Sequence[Side], tokens: int) -> tuple[list[str], list[Row]]:
    """``(columns, rows)``: a column for each library, and how many times the first one's figure the last one's is.

    Args:
        tokens: of one step.
    """
    two = len(sides) > 1
    columns = [side.name for side in sides] + [f"{sides[-1].name.split()[0]} / {sides[0].name.split()[0]}"] * two

    def row(name: str, values: Sequence[float | None], form: str, group: str = "", scale: float = 1) -> Row:
        texts = ["–" if value is None else format(value / scale if scale != 1 else value, form) for value in values]
        first, last = values[0], values[-1]
        ratio = [f"{last / first:.2f}x" if first and last else ""] * two
        return Row(name, [*texts, *ratio], [*values, *[None] * two] if group else (), group)

    losses = [
        Row(f"loss, step {step + 1}", [*(f"{side.losses[0][step]:.5f}" for side in sides), *[""] * two])
        for step in range(len(sides[0].losses[0]))
    ]
    spread = [f"{side.timed[0]:.3f} - {side.timed[-1]:.3f}" for side in sides]
    return columns, [
        *losses,
        row("time per step, median (s)", [side.median for side in sides], ".3f", "Time per step"),
        Row("  fastest - slowest", [*spread, *[""] * two]),
        row(
            "processor time per step (s)",
            [statistics.median(_warm(side.cpu)) for side in sides],
            ".3f",
            "Time per step",
        ),
        row("tokens per second", [tokens / side.median for side in sides], ",.0f", "Throughput"),
        row("peak memory of training (MB)", [side.peak for side in sides], ",.0f", "Peak memory", 1e6),
        row("libraries in memory (MB)", [side.libraries for side in sides], ",.0f", "Libraries in memory", 1e6),
        row("trainable parameters", [side.trainable for side in sides], ",d"),
        row("adapter on disk (MB)", [side.adapter for side in sides], ",.2f", "Adapter on disk", 1e6),
    ]
