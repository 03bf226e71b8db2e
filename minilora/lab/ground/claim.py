"""A claim of the field, the smallest honest test of it, and a verdict.

A file of ``lab/claims`` holds one: ``CLAIM`` says what is claimed, where, and with which number; ``run`` tries it on the lab's ground
(``lab/ground/ground.py``) and returns a ``Finding``. The verdict is about this ground: a small model, short runs, one computer. It is
computed from intervals over seeds and never written down: ``holds here`` and ``fails here`` need an interval that lies wholly on one
side of what the claim says, all else is ``undecided here``. Next file: ``lab/ground/ground.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minilora.lab.verdicts.interval import Interval

__all__ = [
    "FAILS",
    "HOLDS",
    "UNDECIDED",
    "Claim",
    "Curve",
    "Finding",
    "Picture",
    "above",
    "all_of",
    "below",
    "within",
]

HOLDS, FAILS, UNDECIDED = "holds here", "fails here", "undecided here"


@dataclass(frozen=True)
class Claim:
    """What is claimed.

    Attributes:
        name: what the command calls it. sentence: the claim, in words that can be wrong. source: paper and section. number: what the source
            measured or says. exact: whether it is a law that holds to rounding, so that no seed matters.
    """

    name: str
    sentence: str
    source: str
    number: str
    exact: bool = False


class Curve(NamedTuple):
    """A line of a picture: ``(x, mean, low, high)`` of each point."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Picture:
    """What a figure shows: curves over x.

    Attributes:
        log_x, log_y: whether the axes are logarithmic. before: the value before training; what is larger leaves the picture.
    """

    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    before: float | None = None


@dataclass(frozen=True)
class Finding:
    """What came of trying a claim.

    Attributes:
        verdict: HOLDS, FAILS or UNDECIDED. said: the figures that it rests on, in a sentence. rows: a table. picture: or None.
    """

    verdict: str
    said: str
    rows: Sequence[Mapping[str, Any]] = ()
    picture: Picture | None = None


def above(found: Interval, bound: float) -> str:
    """The verdict on "it is more than ``bound``"."""
    return HOLDS if found.low > bound else FAILS if found.high < bound else UNDECIDED


def below(found: Interval, bound: float) -> str:
    """The verdict on "it is less than ``bound``"."""
    return HOLDS if found.high < bound else FAILS if found.low > bound else UNDECIDED


def within(found: Interval, bound: float) -> str:
    """The verdict on "it differs from 0 by no more than ``bound``"."""
    if -bound <= found.low and found.high <= bound:
        return HOLDS
    return FAILS if found.low > bound or found.high < -bound else UNDECIDED


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on several at once: one that fails fails all."""
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
