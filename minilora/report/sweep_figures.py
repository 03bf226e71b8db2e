"""Figures of a sweep: loss by learning rate, and the distance to the best.

    losses = {"r=4": {1e-3: [1.31, 1.29], 1e-2: [1.22, 1.24]}, "r=16": {1e-3: [1.27, 1.26], 1e-2: [1.3, math.nan]}}
    rate_figure(losses).savefig("rates.pdf")

Names are of families: what was tried but for its rate. A loss that is not finite is of a trial that diverged. As in ``figures.py`` each
function returns a ``matplotlib.figure.Figure``, and without matplotlib raises ``MissingPackageError``. Next file: ``report/frontier.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minilora.report.canvas import LINE_HEIGHT, PAGE, WIDE, add_legend, canvas, check
from minilora.report.heatmap import scale_of
from minilora.report.labels import add_ends, clipped, fit
from minilora.report.svg import SERIES, hover
from minilora.report.tables import as_number, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LOSS", "colour_of", "dash_of", "drawn", "rate_figure", "regret_figure", "round_numbers"]

Losses = Mapping[str, Mapping[float, Sequence[float]]]  # name to rate to the loss of each seed
Means = dict[str, list[tuple[float, float]]]  # name to (rate, mean over the seeds that did not diverge, or NaN)

RATE, LOSS, REGRET = "learning rate", "loss (nats per token)", "loss above the best (nats per token)"
STRIP = 13  # points that a strip above the axes takes
STYLES = ("-", "--", ":", "-.")


def rate_figure(losses: Losses, *, label: str = LOSS, width: float = WIDE) -> Figure:
    """Loss by learning rate: a line a family, of the means over seeds, in a band from the lowest seed to the highest.

    A trial that diverged is a cross above the axes. So is, as an arrow, a mean far above the others, which would flatten them.

    Args:
        label: what the losses are.

    Raises:
        ConfigError: no loss is finite.
    """
    means = _means(losses)
    low, top = _span(losses, _finite(means))
    with canvas(width, _height(means, width)) as (figure, axes):
        axes.set_ylim(low, top)
        _rates_axis(axes, means, width)
        for place, (name, points) in enumerate(means.items()):
            _band(axes, [(rate, *_ends(losses[name][rate])) for rate, mean in points if mean <= top], top, place)
            _line(axes, name, points, top, place)
        round_numbers(axes)
        above = [(name, rate, mean) for name, points in means.items() for rate, mean in points if mean > top]
        _finish(figure, axes, losses, means, top, above, label)
    return figure


def regret_figure(losses: Losses, *, width: float = WIDE) -> Figure:
    """How far the mean of each rate is from the lowest mean of the sweep, by learning rate; the scale is logarithmic above 0.

    Raises:
        ConfigError: no loss is finite.
    """
    means = _means(losses)
    best = min(_finite(means))
    regrets = {name: [(rate, mean - best) for rate, mean in points] for name, points in means.items()}
    above = [value for value in _finite(regrets) if value > 0]
    with canvas(width, _height(means, width)) as (figure, axes):
        _zero_and_up(axes, above)
        _rates_axis(axes, means, width)
        for place, (name, points) in enumerate(regrets.items()):
            _line(axes, name, points, math.inf, place)
        _finish(figure, axes, losses, regrets, math.inf, [], REGRET)
    return figure


def _means(losses: Losses) -> Means:
    """Raises ``ConfigError``: nothing is finite, or a rate is not above 0."""
    means: Means = {}
    for name, rates in losses.items():
        finite = {rate: [loss for loss in rates[rate] if drawn(loss)] for rate in sorted(rates)}
        means[name] = [(rate, sum(seeds) / len(seeds) if seeds else math.nan) for rate, seeds in finite.items()]
    check("loss by learning rate", [point for points in means.values() for point in points])
    check("learning rate above 0", [(0, math.log(rate) if rate > 0 else math.nan) for rate in _rates(means)])
    return means


def _span(losses: Losses, means: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis: from the lowest seed to the highest mean that is no outlier; around all seeds if the means are equal."""
    seeds = [loss for rates in losses.values() for own in rates.values() for loss in own if drawn(loss)]
    if min(means) < max(means):
        return min(seeds), min(means) + scale_of([mean - min(means) for mean in means])
    margin = max(0.2 * (max(seeds) - min(seeds)), 0.02 * abs(means[0]), 1e-3)
    return min(seeds) - margin, max(seeds) + margin


def drawn(value: float) -> bool:
    """Whether it is finite, and an axis can show it."""
    return math.isfinite(as_number(value))


def _ends(seeds: Sequence[float]) -> tuple[float, float]:
    finite = [loss for loss in seeds if drawn(loss)]
    return min(finite), max(finite)


def _finite(means: Means) -> list[float]:
    return [mean for points in means.values() for _, mean in points if math.isfinite(mean)]


def _rates(means: Means) -> list[float]:
    return sorted({rate for points in means.values() for rate, _ in points})


def colour_of(place: int) -> str:
    """Of the family at a place in the order of all."""
    return SERIES[place % len(SERIES)]


def dash_of(place: int) -> str:
    """The style of its line, which tells families of one colour from each other."""
    return STYLES[place // len(SERIES) % len(STYLES)]


# ---- lines


def _line(axes: Axes, name: str, points: Sequence[tuple[float, float]], top: float, place: int) -> None:
    """The means as a line, cut where it leaves the axes at ``top``, and those inside as points."""
    style = {"color": colour_of(place), "linestyle": dash_of(place), "clip_on": False}
    cut = list(_cut(points, top))
    axes.plot([x for x, _ in cut], [y for _, y in cut], label=clipped(name), **style)
    if inside := [(rate, value) for rate, value in points if value <= top]:
        look = {"linestyle": "none", "marker": "o", "markeredgecolor": PAGE, "markeredgewidth": 1.1, "clip_on": False}
        (marks,) = axes.plot([x for x, _ in inside], [y for _, y in inside], color=style["color"], zorder=2.5, **look)
        hover(marks, [f"{name}, {short_number(rate)}: {short_number(value)}" for rate, value in inside])


def _cut(points: Sequence[tuple[float, float]], top: float) -> Iterator[tuple[float, float]]:
    """The points, with those above ``top`` as gaps, and the points where the line crosses it; rates are on a log axis."""
    for at, (rate, value) in enumerate(points):
        if at and (value > top) != (points[at - 1][1] > top) and math.isfinite(value + points[at - 1][1]):
            before, low = points[at - 1]
            yield before * (rate / before) ** ((top - low) / (value - low)), top
        yield rate, value if value <= top else math.nan


def _band(axes: Axes, ends: Sequence[tuple[float, float, float]], top: float, place: int) -> None:
    """From the lowest seed to the highest; a bar where there is one rate."""
    rates, low, high = ([min(values[at], top) if at else values[at] for values in ends] for at in range(3))
    if len(ends) > 1:
        axes.fill_between(rates, low, high, color=colour_of(place), alpha=0.14, linewidth=0, clip_on=False)
    elif ends and high[0] > low[0]:
        axes.plot(rates * 2, [low[0], high[0]], color=colour_of(place), alpha=0.3, linewidth=4, clip_on=False)


# ---- axes


def _height(means: Means, width: float) -> float:
    """Inches: with room for the names, a line each."""
    return max(2.6, min(0.5 * width, 3.8), LINE_HEIGHT * len(means) + 1.2 if fit(means, width) else 0.0)


def _rates_axis(axes: Axes, means: Means, width: float) -> None:
    """A log axis whose ticks are the rates that were tried, as many as find room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rates = _rates(means)
    margin = max(1.15, (rates[-1] / rates[0]) ** 0.03) if len(rates) > 1 else 2.0
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / margin, rates[-1] * margin)
    room = math.log(rates[-1] / rates[0] * margin**2) * 0.5 / (0.7 * width)
    shown = rates[:1]
    for rate in rates[1:]:
        if math.log(rate / shown[-1]) >= room:
            shown.append(rate)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, ".3g")))
    axes.set_xlabel(RATE)


def round_numbers(axes: Axes) -> None:
    """On the vertical axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, ",.10g")))


def _zero_and_up(axes: Axes, above: Sequence[float]) -> None:
    """A scale with 0 at its lower end, and logarithmic from the least of the values above 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not above:
        axes.set_ylim(0, 1e-3)
        return round_numbers(axes)
    first, last = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
    axes.set_yscale("symlog", linthresh=10**first, linscale=0.4)
    parts = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [part * 10.0**power for power in range(first, last + 1) for part in parts]
    ticks = [tick for tick in ticks if tick < 2 * max(above)]
    axes.yaxis.set_major_locator(FixedLocator([0.0, *ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, ".3g")))
    axes.set_ylim(0, max(*above, 10**first) * 1.15)


def _finish(
    figure: Figure,
    axes: Axes,
    losses: Losses,
    lines: Means,
    top: float,
    above: Sequence[tuple[str, float, float]],
    label: str,
) -> None:
    """The strips above the axes, the names, and what the height is."""
    names, strips = list(lines), []
    if above:
        tips = [(name, rate, f"{name}, {short_number(rate)}: {short_number(mean)}") for name, rate, mean in above]
        strips.append(("above", "^", tips))
    lost = [(n, rate, sum(not drawn(x) for x in seeds), len(seeds)) for n in names for rate, seeds in losses[n].items()]
    if tips := [
        (n, rate, f"{n}, {short_number(rate)}: {bad} of {all_} diverged") for n, rate, bad, all_ in lost if bad
    ]:
        strips.append(("diverged", "X", tips))
    for level, (text, marker, marks) in enumerate(strips):
        _strip(axes, level, text, marker, marks, names)
    axes.set_title(label, loc="left", pad=6 + STRIP * len(strips) + 4 * bool(strips))
    if len(names) == 1:
        return
    if fit(names, figure.get_figwidth()):
        ends = [(name, *_last(points, top), colour_of(names.index(name))) for name, points in lines.items()]
        add_ends(axes, [end for end in ends if drawn(end[2])], figure.get_figheight() - 0.8 - STRIP / 72 * len(strips))
    else:
        add_legend(figure, [line for line in axes.get_lines() if not line.get_label().startswith("_")])


def _last(points: Sequence[tuple[float, float]], top: float) -> tuple[float, float]:
    """The last point that is drawn; a line that leaves the axes is named by it, as all leave at the same height."""
    return next(((x, y) for x, y in reversed(points) if y <= top), (math.nan, math.nan))


def _strip(
    axes: Axes, level: int, text: str, marker: str, marks: Sequence[tuple[str, float, str]], names: Sequence[str]
) -> None:
    """A row of marks above the axes: those of one rate side by side, in the colours of their families."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = axes.figure
    up = 9 + STRIP * level
    rates = sorted({rate for _, rate, _ in marks})
    (left, right), inner = axes.get_xlim(), 72 * 0.7 * figure.get_figwidth()
    apart = [inner * math.log(b / a) / math.log(right / left) for a, b in itertools.pairwise(rates)]
    for rate in rates:
        here = [(name, tip) for name, at, tip in marks if at == rate]
        step = min(8.0, 0.8 * min(apart, default=inner) / len(here))
        for at, (name, tip) in enumerate(here):
            shift = ScaledTranslation(step * (at - (len(here) - 1) / 2) / 72, up / 72, figure.dpi_scale_trans)
            look = {"marker": marker, "color": colour_of(names.index(name)), "clip_on": False, "markeredgewidth": 0}
            (mark,) = axes.plot([rate], [1], linestyle="none", transform=axes.get_xaxis_transform() + shift, **look)
            hover(mark, [tip])
    axes.annotate(text, (0, 1), (-6, up), xycoords="axes fraction", textcoords="offset points", ha="right", va="center")
