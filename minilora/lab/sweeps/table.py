"""The trials of a sweep as a table: one row each, for a CSV file, a report and a terminal. Next file: ``lab/verdicts/groups.py``."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from minilora.lab.sweeps.trial import Result, Trial

__all__ = ["GOES", "as_csv", "described", "differing", "label", "rows"]

GOES = "has not ended"  # what the table says of a trial that goes

_ALWAYS = ("variant", "r", "lora_alpha", "target_modules", "lr", "seed")


def described(trial: Trial) -> dict[str, Any]:
    """Every setting of a trial by name; ``lora`` settings are left out for full fine-tuning, whose variant is "full"."""
    lora = {} if trial.lora is None else {f.name: getattr(trial.lora, f.name) for f in dataclasses.fields(trial.lora)}
    kind = "full" if trial.lora is None else trial.variant or trial.lora.variant
    return {"variant": kind} | lora | {f.name: getattr(trial.train, f.name) for f in dataclasses.fields(trial.train)}


def differing(trials: Sequence[Trial]) -> list[str]:
    """The settings in which trials differ, and those that everybody asks for, in the order of the latter."""
    every = [described(trial) for trial in trials]
    names = list(dict.fromkeys(name for each in every for name in each))
    apart = [name for name in names if len({repr(each[name]) for each in every if name in each}) > 1]
    return [*_ALWAYS, *(name for name in apart if name not in _ALWAYS)]


def label(trial: Trial, names: Sequence[str]) -> str:
    """What a trial is, in the settings of these names: ``lora r=4 lr=0.001``."""
    own = described(trial)
    kind = own["variant"] if "variant" in names else ""
    return " ".join(
        [kind, *(f"{name}={_short(own[name])}" for name in names if name != "variant" and name in own)]
    ).strip()


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a trial: name, settings, what came out.

    Losses are nats a token; ``loss`` is the mean over the last tenth of the steps. ``steps`` are asked for, ``done`` changed the weights.
    ``ended`` says why a trial ended early, and of one that goes that it has not ended.
    """
    names, made = differing([result.trial for result in results]), []
    measured = list(dict.fromkeys(name for result in results for name in result.measured))
    for result in results:
        own, losses = described(result.trial), result.losses
        last = losses[-max(1, len(losses) // 10) :]
        row = {"run": result.name} | {name: _short(own[name]) if name in own else "" for name in names}
        row |= {"steps": own["steps"], "done": len(losses), "loss": sum(last) / len(last) if last else None}
        row |= {"eval_loss": result.eval_loss}
        row |= {name: result.measured.get(name) for name in measured}
        row |= {"parameters": result.parameters, "seconds": round(result.seconds, 3)}
        ended = result.ended or ("" if result.finished else GOES)
        made.append(row | {"together": "no: " + result.alone if result.alone else "yes", "ended": ended})
    return made


def as_csv(results: Sequence[Result]) -> str:
    """The table as CSV, which pandas and spreadsheets read."""
    made = rows(results)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(made[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in made)
    return file.getvalue()


def _short(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple, set)) else value
