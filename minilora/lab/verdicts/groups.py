"""What came out of a sweep, by what was tried: read from its table, so that it can be told again at any later time.

A *group* is trials that differ in the seed only. A *family* is groups that differ in the learning rate only; it is judged at its best
rate. Next file: ``lab/verdicts/verdict.py``.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from minilora.errors import CheckpointError
from minilora.lab.sweeps.table import GOES
from minilora.lab.verdicts.interval import Interval, interval
from minilora.lora.config import LoraConfig

__all__ = ["Family", "Group", "Outcome", "Outcomes", "families_of", "read_table"]

_AROUND = (
    "run",
    "done",
    "loss",
    "eval_loss",
    "parameters",
    "seconds",
    "together",
    "ended",
)  # columns that are no settings
_OF_LORA = {field.name for field in dataclasses.fields(LoraConfig)}
# How the sentences begin that say why a trial ended for want of finite numbers; others were refused.
_DIVERGED = ("step ", "the first step has no finite gradient")


@dataclass(frozen=True)
class Outcome:
    """One trial, as a row of the table has it.

    Attributes:
        settings: by name, as text; with ``lr`` and ``seed``, ``""`` for what it has not. loss: nats a token, or None.
        fate: "" for one that came to its end with a loss, "diverged", "refused" or "goes". ended: why, in words.
    """

    name: str
    settings: Mapping[str, str]
    loss: float | None
    fate: str
    ended: str
    alone: str
    parameters: int
    seconds: float
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Outcomes:
    """All trials of a sweep. ``by``: what ``loss`` is: "eval_loss", or "loss" (training) where nothing was evaluated."""

    trials: Sequence[Outcome]
    by: str


@dataclass
class Group:
    """Trials that differ in the seed only."""

    family: str
    rate: float
    trials: list[Outcome] = field(default_factory=list)

    @functools.cached_property
    def losses(self) -> dict[int, float]:
        """Seed to loss of those that came to their end; a seed that ran twice counts once, as equal seeds tell nothing new."""
        return {int(trial.settings["seed"]): trial.loss for trial in self.trials if trial.loss is not None}

    @functools.cached_property
    def interval(self) -> Interval | None:
        """Of the losses; None where no trial came to its end."""
        return interval(self.losses.values()) if self.losses else None

    @property
    def diverged(self) -> int:
        """Seeds that diverged."""
        return len({trial.settings["seed"] for trial in self.trials if trial.fate == "diverged"})

    @property
    def tried(self) -> int:
        """Seeds that came to their end or diverged."""
        return len(self.losses) + self.diverged

    def measured(self, name: str) -> Interval | None:
        """Of what was measured by this name."""
        found = {trial.settings["seed"]: trial.measured[name] for trial in self.trials if name in trial.measured}
        return interval(found.values()) if found else None


@dataclass(frozen=True)
class Family:
    """Groups that differ in the learning rate only, by rate."""

    name: str
    groups: Sequence[Group]

    @functools.cached_property
    def best(self) -> Group | None:
        """The group of the lowest mean loss among those with the fewest diverged seeds; None where no trial came to its end."""
        ended = [group for group in self.groups if group.interval]
        return min(ended, key=rank, default=None)

    @property
    def edge(self) -> str:
        """Where the best rate lies at the edge of those that were tried: "highest", "lowest" or "only"; otherwise ""."""
        rates = [group.rate for group in self.groups if group.tried]
        if self.best is None or min(rates) < self.best.rate < max(rates):
            return ""
        return "only" if len(rates) == 1 else "highest" if self.best.rate == max(rates) else "lowest"


def rank(group: Group) -> tuple[int, float]:
    """What groups are sorted by: a mean over the seeds that did not diverge is no rival of one over all."""
    return (group.diverged, group.interval.mean) if group.interval else (group.diverged, math.inf)


# ---- reading


def read_table(text: str, where: str = "the table") -> Outcomes:
    """The trials of ``runs.csv``.

    Raises:
        CheckpointError: no table of a sweep, or a number in it that is none; with its line.
    """
    reader = csv.DictReader(io.StringIO(text))
    heads = list(reader.fieldnames or ())
    if lacking := [name for name in (*_AROUND, "lr", "seed") if name not in heads]:
        raise CheckpointError(
            f"{where}: no table of a sweep (no column {lacking[0]!r}); wanted runs.csv as a sweep writes it"
        )
    settings = [name for name in heads[: heads.index("loss")] if name not in _AROUND]
    measured = heads[heads.index("eval_loss") + 1 : heads.index("parameters")]
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise CheckpointError(f"{where}, line {reader.line_num}: not {len(heads)} cells as in the first line")
        rows.append((reader.line_num, row))
    if not rows:
        raise CheckpointError(f"{where}: no trial in it; wanted one at least")
    evaluated = any(row["eval_loss"] for _, row in rows) or not any(row["loss"] and not row["ended"] for _, row in rows)
    by = "eval_loss" if evaluated else "loss"
    return Outcomes([_outcome(row, by, settings, measured, f"{where}, line {line}") for line, row in rows], by)


def _outcome(row: Mapping[str, str], by: str, settings: Sequence[str], measured: Sequence[str], where: str) -> Outcome:
    for name, kind in (("lr", float), ("seed", int), ("parameters", int), ("seconds", float)):
        _number(row, name, kind, where)
    if not 0 < float(row["lr"]) < math.inf:
        raise CheckpointError(f"{where}: lr={row['lr']}; wanted a finite rate above 0: restore the table")
    loss = _number(row, by, float, where) if row[by] and not row["ended"] else None
    loss = None if loss is None or not math.isfinite(loss) else loss
    ended = row["ended"] or ("" if loss is not None else "its last loss is not finite")
    fate = "" if loss is not None else "goes" if ended == GOES else "refused"
    if fate == "refused" and (not row["ended"] or ended.startswith(_DIVERGED)):
        fate = "diverged"
    found = {name: _number(row, name, float, where) for name in measured if row[name]}
    return Outcome(
        row["run"],
        {name: row[name] for name in settings},
        loss,
        fate,
        ended,
        "" if row["together"] == "yes" else row["together"].removeprefix("no: "),
        int(row["parameters"]),
        float(row["seconds"]),
        {name: value for name, value in found.items() if math.isfinite(value)},
    )


def _number(row: Mapping[str, str], name: str, kind: type[float] | type[int], where: str) -> float:
    try:
        return kind(row[name])
    except ValueError:
        raise CheckpointError(f"{where}: {name}={row[name]!r} is no number; restore the table") from None


# ---- grouping


def families_of(outcomes: Outcomes) -> list[Family]:
    """The families in the order of their first trials, their groups by rate."""
    names = _names([trial.settings for trial in outcomes.trials])
    made: dict[str, dict[float, Group]] = {}
    for trial, name in zip(outcomes.trials, names, strict=True):
        rate = float(trial.settings["lr"])
        made.setdefault(name, {}).setdefault(rate, Group(name, rate)).trials.append(trial)
    return [Family(name, [groups[rate] for rate in sorted(groups)]) for name, groups in made.items()]


def _names(trials: Sequence[Mapping[str, str]]) -> list[str]:
    """What each trial is called but for its rate and seed: the settings in which the trials differ, ``dora r=4``."""
    apart = [name for name in trials[0] if name not in ("lr", "seed") and len({trial[name] for trial in trials}) > 1]
    return [" ".join(_words(trial, apart)) or trial.get("variant", "") or "all trials" for trial in trials]


def _words(trial: Mapping[str, str], names: Iterable[str]) -> Iterable[str]:
    full = trial.get("variant") == "full"
    for name in names:
        if name == "variant":
            yield trial[name]
        elif not (full and name in _OF_LORA):
            yield f"{name}={_as_in_a_grid(trial[name]) or 'none'}"


def _as_in_a_grid(value: str) -> str:
    """Names of modules with ``+`` between them; the rest as it is."""
    return value.replace(" ", "+") if re.fullmatch(r"[\w.*-]+( [\w.*-]+)*", value) else value
