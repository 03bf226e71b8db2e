"""What can be said from a few seeds: an interval of a mean, and whether two things can be told apart.

    interval([1.21, 1.19, 1.23])                            # mean 1.21, 95 % interval 1.160 to 1.260
    told_apart({0: 1.21, 1: 1.19}, {0: 1.26, 1: 1.25})      # of the differences of equal seeds

The intervals are Student's, of level 95 %: were everything run again and again with new seeds, 95 % of such intervals would hold the true
mean, as far as the values are spread like a normal distribution. Of one value nothing is known but itself, so its interval has no ends.
Next file: ``lab/verdicts/groups.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from minilora.errors import ConfigError

__all__ = ["LEVEL", "Difference", "Interval", "interval", "slope", "t_quantile", "told_apart"]

LEVEL = 0.95
_PANELS = 400  # of the integral: up to level 0.99, the quantile is right to seven digits


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies.

    Attributes:
        low, high: the ends; infinite where one value is all there is. spread: standard deviation of the values, as of a sample (divided by
            ``count - 1``); NaN of one value. count: of the values.
    """

    mean: float
    low: float
    high: float
    spread: float = math.nan
    count: int = 1

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2

    def holds(self, value: float) -> bool:
        """Whether ``value`` is inside, or on an end."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Difference:
    """The second minus the first.

    Attributes:
        paired: the differences are of equal seeds; otherwise of the means. apart: 0 is outside of the interval.
    """

    interval: Interval
    paired: bool

    @property
    def apart(self) -> bool:
        """Whether the two can be told apart."""
        return not self.interval.holds(0.0)


def interval(values: Iterable[float], level: float = LEVEL) -> Interval:
    """Mean, ends and spread of values, one a seed (W. S. Gosset as "Student", Biometrika 6, 1908).

    Raises:
        ConfigError: no value, or one that is not finite.
    """
    given = _finite(values)
    count, mean = len(given), math.fsum(given) / len(given)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(_variance(given))
    half = t_quantile(count - 1, level) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, spread, count)


def told_apart(first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL) -> Difference:
    """How much larger the second is than the first, by seed.

    Seeds that both have are compared with each other, which takes out what a seed does to both; the seeds of only one are left out
    then. Where they share fewer than two, the means are compared instead (B. L. Welch, Biometrika 34, 1947).

    Args:
        first, second: seed to value.

    Raises:
        ConfigError: no value, or one that is not finite.
    """
    one, other = _finite(first.values()), _finite(second.values())
    both = sorted(first.keys() & second.keys())
    if len(both) >= 2:
        return Difference(interval([second[seed] - first[seed] for seed in both], level), True)
    if min(len(one), len(other)) < 2:
        return Difference(_of_one(first, second, both), bool(both))
    return Difference(_welch(one, other, level), False)


def _of_one(first: Mapping[int, float], second: Mapping[int, float], both: list[int]) -> Interval:
    """A difference without ends, of the seed that they share or of the means."""
    if both:
        return interval([second[both[0]] - first[both[0]]])
    return interval([interval(second.values()).mean - interval(first.values()).mean])


def _welch(first: list[float], second: list[float], level: float) -> Interval:
    count = min(len(first), len(second))
    mean = math.fsum(second) / len(second) - math.fsum(first) / len(first)
    parts = [_variance(values) / len(values) for values in (first, second)]
    total = sum(parts)
    if total == 0:
        return Interval(mean, mean, mean, 0.0, count)
    freedom = total**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True))
    half = t_quantile(freedom, level) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half, math.sqrt(total), count)


def _variance(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _finite(values: Iterable[float]) -> list[float]:
    given = [float(value) for value in values]
    if not given or not all(map(math.isfinite, given)):
        bad = next((value for value in given if not math.isfinite(value)), "none")
        raise ConfigError(f"{len(given)} values over seeds, of which {bad}; wanted one or more, and finite ones")
    return given


def slope(points: Iterable[tuple[float, float]]) -> float:
    """The slope of the line through ``(x, y)`` by least squares.

    Raises:
        ConfigError: fewer than two different x.
    """
    x, y = zip(*points, strict=True)
    middle, height = math.fsum(x) / len(x), math.fsum(y) / len(y)
    width = math.fsum((at - middle) ** 2 for at in x)
    if width == 0:
        raise ConfigError(f"all points are at x={x[0]}; wanted two different x at least, for a slope")
    return math.fsum((at - middle) * (value - height) for at, value in zip(x, y, strict=True)) / width


@functools.cache
def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """How far from 0 a Student's t reaches, to both sides, with probability ``level``: 12.71 for 1 degree of freedom, 1.96 for many.

    With t = sqrt(freedom) tan(angle) its density becomes a power of a cosine, whose integral over a finite range is found by Simpson's
    rule, and inverted by halving.

    Raises:
        ConfigError: ``freedom`` below 1, or ``level`` outside of 0 to 1.
    """
    if not 1 <= freedom < math.inf or not 0 < level < 1:
        raise ConfigError(f"freedom={freedom}, level={level}; wanted freedom >= 1, and a level between 0 and 1")
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    wanted = level / 2 / math.exp(log_scale)
    low, high = 0.0, math.pi / 2
    if freedom > 100:  # nothing to find further out, and there the panels would be too wide
        high = math.atan(40 / math.sqrt(freedom))
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _cosines(freedom - 1, middle) < wanted else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _cosines(power: float, end: float) -> float:
    """The integral of ``cos(x) ** power`` from 0 to ``end``, by Simpson's rule."""
    width = end / _PANELS
    heights = [math.cos(width * at) ** power for at in range(_PANELS + 1)]
    return width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
