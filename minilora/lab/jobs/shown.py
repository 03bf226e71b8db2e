"""The table of a sweep for a terminal: the best trial first, and the settings in which trials differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from minilora.lab.sweeps.table import described, differing, rows
from minilora.lab.sweeps.trial import Result
from minilora.report.tables import Row, as_text, short_number

__all__ = ["as_table", "ranked"]

_LONGEST = 28  # signs of a cell


def ranked(results: Sequence[Result]) -> list[Result]:
    """The lowest evaluation loss first, or the lowest training loss where nothing was evaluated; those that ended early are the last."""
    losses = {row["run"]: row["loss"] for row in rows(results)}
    evaluated = any(result.eval_loss is not None for result in results)

    def place(result: Result) -> float:
        loss = result.eval_loss if evaluated else losses[result.name]
        return math.inf if result.ended or loss is None else loss

    return sorted(results, key=place)


def as_table(results: Sequence[Result]) -> str:
    """The table, what all trials have alike above it, and why a trial ended early below it."""
    made = rows(ranked(results))
    names = differing([result.trial for result in results])
    alike = [name for name in names if len({repr(described(r.trial).get(name)) for r in results}) == 1]
    left_out = {*alike, "run", "together", "ended"} | {
        name for name in made[0] if all(_empty(row[name]) for row in made)
    }
    columns = [name for name in made[0] if name not in left_out]
    table = as_text(columns, [Row(row["run"], [_cell(row[name]) for name in columns]) for row in made], bars=False)
    same = " ".join(f"{name}={_cell(made[0][name])}" for name in alike if not _empty(made[0][name]))
    ended = [f"{row['run']} ended early: {row['ended']}" for row in made if row["ended"]]
    return "\n".join([*([f"alike in all: {same}"] if same and len(results) > 1 else []), table, *ended])


def _empty(value: Any) -> bool:
    return value is None or value == ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return short_number(value)
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
