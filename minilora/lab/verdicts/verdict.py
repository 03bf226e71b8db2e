"""The closing words of a sweep: what is best, what cannot be told from it, what is worse, and what was not tried.

    print(" ".join(closing(read_table(text))))

Every family is judged at its best rate. Comparisons are of the seeds that both have, each by itself at 95 % (``lab/verdicts/interval.py``).
Next file: ``lab/verdicts/report.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minilora.lab.verdicts.groups import Family, Group, Outcomes, families_of, rank
from minilora.lab.verdicts.interval import Difference, Interval, interval, t_quantile, told_apart
from minilora.report.tables import short_number

__all__ = [
    "Difference",
    "Interval",
    "Rival",
    "Verdict",
    "closing",
    "interval",
    "shown_difference",
    "shown_ends",
    "shown_interval",
    "shown_loss",
    "t_quantile",
    "told_apart",
    "verdict",
]

MOST = 6  # of a kind that are named


@dataclass(frozen=True)
class Rival:
    """A family that is not the best, at its best rate. ``difference``: its loss minus that of the best."""

    group: Group
    difference: Difference


@dataclass(frozen=True)
class Verdict:
    """What the losses of a sweep say.

    Attributes:
        best: the group of the lowest mean loss (``groups.rank``); None where no trial came to its end. The other families, by loss:
        alike: cannot be told from it. worse: are. untold: share no two seeds with it, so nobody can say. below: are lower at the seeds
            that came to their end, but more of theirs diverged.
    """

    best: Group | None
    alike: Sequence[Rival] = ()
    worse: Sequence[Rival] = ()
    untold: Sequence[Rival] = ()
    below: Sequence[Rival] = ()


def verdict(families: Iterable[Family]) -> Verdict:
    """Compare the families, each at its best rate, with the best of them."""
    groups = sorted((family.best for family in families if family.best), key=rank)
    if not groups:
        return Verdict(None)
    best, *others = groups
    rivals = [Rival(group, told_apart(best.losses, group.losses)) for group in others]
    told = [rival for rival in rivals if math.isfinite(rival.difference.interval.low)]
    return Verdict(
        best,
        [rival for rival in told if not rival.difference.apart],
        [rival for rival in told if rival.difference.interval.low > 0],
        [rival for rival in rivals if rival not in told],
        [rival for rival in told if rival.difference.interval.high < 0],
    )


def closing(outcomes: Outcomes) -> list[str]:
    """The verdict in words, a statement each; the first names the best."""
    families = families_of(outcomes)
    found, what = verdict(families), "evaluation" if outcomes.by == "eval_loss" else "training"
    said = [_best(found.best, what), *_rivals(found), _diverged(families), _refused(outcomes), *_edges(families)]
    goes = sum(trial.fate == "goes" for trial in outcomes.trials)
    if goes:
        said.append(
            f"{goes} of {len(outcomes.trials)} trials {'has' if goes == 1 else 'have'} not ended, so this may change."
        )
    if outcomes.by == "loss":
        said.append("Nothing was evaluated: these are losses of training, over the last tenth of the steps.")
    return [line for line in said if line]


# ---- the statements


def _best(best: Group | None, what: str) -> str:
    if best is None or best.interval is None:
        return "No trial came to its end with a finite loss, so none is the best."
    ends = f" ({shown_interval(best.interval)})" if best.interval.count > 1 else ", of one seed"
    lost = f"; {best.diverged} of its {best.tried} seeds diverged" if best.diverged else ""
    return f"The best is {_place(best)}: {what} loss {shown_loss(best.interval.mean)} nats a token{ends}{lost}."


def _rivals(found: Verdict) -> Iterable[str]:
    if found.alike:
        yield f"At these seeds {_those(found.alike)} cannot be told from it."
    if found.worse:
        yield f"Worse by more than the seeds differ: {_those(found.worse)}."
    if found.below:
        yield f"Lower where they came to their end, but with more seeds that diverged: {_those(found.below)}."
    if found.untold:
        yield f"Whether others are worse cannot be told from one seed: {_those(found.untold)}. Run three seeds or more."


def _those(rivals: Sequence[Rival]) -> str:
    return _listed([f"{_place(rival.group)} ({shown_difference(rival.difference)})" for rival in rivals])


def _diverged(families: Sequence[Family]) -> str:
    """The families by the rates at which they diverged."""
    places: dict[str, list[str]] = {}
    for family in families:
        if rates := [_rate(group) + _share(group) for group in family.groups if group.diverged]:
            places.setdefault(", ".join(rates), []).append(family.name)
    every = len(families) > 2
    told = [
        f"{'every family' if every and len(names) == len(families) else _listed(names)} at lr={rates}"
        for rates, names in places.items()
    ]
    return f"Diverged: {'; '.join(told)}." if told else ""


def _share(group: Group) -> str:
    return f" ({group.diverged} of {group.tried} seeds)" if group.diverged < group.tried else ""


def _refused(outcomes: Outcomes) -> str:
    told = [f"{trial.name} ({trial.ended})" for trial in outcomes.trials if trial.fate == "refused"]
    return f"Did not run: {_listed(told)}." if told else ""


def _edges(families: Sequence[Family]) -> Iterable[str]:
    at = {edge: [family for family in families if family.edge == edge] for edge in ("highest", "lowest", "only")}
    for edge, more in (("highest", "higher"), ("lowest", "lower")):
        if at[edge]:
            names = _listed([f"{family.name} ({_rate(family.best)})" for family in at[edge] if family.best])
            yield f"The best rate is the {edge} tried of {names}: try {more} ones."
    if at["only"]:
        names = "" if len(at["only"]) == len(families) else f" of {_listed([family.name for family in at['only']])}"
        yield f"One rate was tried{names}, so whether another is better is not known."


# ---- words


def _place(group: Group) -> str:
    return f"{group.family} at lr={_rate(group)}"


def _rate(group: Group) -> str:
    return short_number(group.rate)


def _listed(texts: Sequence[str]) -> str:
    """``a, b and c``; of many the first, and how many more."""
    if len(texts) > MOST + 1:
        return f"{', '.join(texts[:MOST])} and {len(texts) - MOST} more"
    return ", ".join(texts[:-1]) + " and " * (len(texts) > 1) + texts[-1]


def shown_loss(loss: float) -> str:
    """A loss in four digits."""
    return short_number(loss, "#.4g").rstrip(".")


def shown_interval(of: Interval) -> str:
    """The ends of an interval, and of how many seeds."""
    return f"95 % interval {shown_ends(of)}, {of.count} seeds"


def shown_ends(of: Interval) -> str:
    """``1.160 to 1.260``."""
    return f"{shown_loss(of.low)} to {shown_loss(of.high)}"


def shown_difference(difference: Difference) -> str:
    """A difference, and where it lies if that is known: ``+0.012, 0.0031 to 0.021``."""
    found = difference.interval
    mean, low, high = (short_number(value, "#.2g").rstrip(".") for value in (found.mean, found.low, found.high))
    sign = "+" if found.mean > 0 else ""
    return f"{sign}{mean}, {low} to {high}" if found.count > 1 else f"{sign}{mean}"
