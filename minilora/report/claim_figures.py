"""The figure of a claim that was tried: curves over x, each with the band that its seeds spread over and its name at its end.

    figure = claim_figure("learning rate", "loss", {"r=4": [(1e-3, 2.1, 2.0, 2.2), (3e-3, 2.0, 1.9, 2.1)]}, log_x=True)

It takes plain numbers. Without matplotlib (the extra ``plot``) it raises ``MissingPackageError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from minilora.report.canvas import LINE_HEIGHT, WIDE, add_line, canvas, check, finish
from minilora.report.svg import SERIES, hover
from minilora.report.tables import as_number, plain_text, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["claim_figure"]

_TICKS = 8  # as many places of x are named one by one


class _Point(NamedTuple):
    x: float
    mean: float
    low: float
    high: float


def claim_figure(
    x: str,
    y: str,
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    top: float | None = None,
    width: float = WIDE,
) -> Figure:
    """A line through the means of every curve, over its band.

    Args:
        x, y: what the axes show, with units. curves: name to ``(x, mean, low, high)``; what is not finite, or not above 0 on a logarithmic
            axis, is a gap. log_x, log_y: whether an axis is logarithmic. top: the largest y that is shown; a line that is beyond leaves the
            picture. width: inches.

    Raises:
        ConfigError: nothing can be drawn.
    """
    drawn = {name: _points(points, log_x, log_y) for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if any(math.isfinite(point.mean) for point in points)}
    check("curves", [(point.x, point.mean) for points in drawn.values() for point in points])
    with canvas(width, max(2.2, 0.5 * width, LINE_HEIGHT * (len(drawn) + 4))) as (figure, axes):
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        for place, (name, points) in enumerate(drawn.items()):
            _draw(axes, name, points, SERIES[place % len(SERIES)], "--" if place // len(SERIES) % 2 else "-")
        whole = all(point.x == round(point.x) for points in drawn.values() for point in points)
        finish(figure, axes, x, y + ", log scale" * log_y, whole=whole, legend=False)
        _name_heights(axes, log_y)
        if top is not None:
            _cut(axes, top)
        _name_places(axes, sorted({point.x for points in drawn.values() for point in points}), log_x)
        if len(drawn) > 1:
            _name_ends(axes, drawn)
    return figure


def _points(points: Sequence[tuple[float, float, float, float]], log_x: bool, log_y: bool) -> list[_Point]:
    """By x; a mean that cannot be drawn is NaN, and so are ends that cannot."""
    made = []
    for point in sorted(_Point(*map(as_number, each)) for each in points):
        values = [value if math.isfinite(value) and (value > 0 or not log_y) else math.nan for value in point[1:]]
        if math.isfinite(point.x) and (point.x > 0 or not log_x):
            made.append(_Point(point.x, *values))
    return made


def _draw(axes: Axes, name: str, points: Sequence[_Point], colour: str, style: str) -> None:
    add_line(axes, name, [(point.x, point.mean) for point in points], colour, linestyle=style)
    line = axes.get_lines()[-1]
    if line.get_marker() == "o":
        texts = [
            f"{name}, {short_number(points[at].x)}: {short_number(points[at].mean)}" for at in line.get_markevery()
        ]
        hover(line, texts)
    ended = [math.isfinite(point.low + point.high + point.mean) and point.low < point.high for point in points]
    lows, highs = [point.low for point in points], [point.high for point in points]
    axes.fill_between([point.x for point in points], lows, highs, where=ended, color=colour, alpha=0.13, linewidth=0)
    for at, point in enumerate(points):  # one that stands alone has no width to fill
        if ended[at] and not any(ended[max(0, at - 1) : at]) and not any(ended[at + 1 : at + 2]):
            axes.plot([point.x, point.x], [point.low, point.high], color=colour, alpha=0.4, label="_end", clip_on=False)


def _name_places(axes: Axes, places: Sequence[float], log: bool) -> None:
    """Name the places of x themselves where they are few on a logarithmic axis: 0.0003, 0.001, 0.003."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if log:
        axes.xaxis.set_major_locator(FixedLocator(places) if len(places) <= _TICKS else LogLocator(numticks=_TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _name_heights(axes: Axes, log: bool) -> None:
    """Round numbers on a logarithmic axis that is too short for powers of ten, and its ends at two of them."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervaly
    if log and low < high < 5 * low:
        rounded = MaxNLocator(5, steps=[1, 2, 5, 10])
        ticks = [tick for tick in rounded.tick_values(low, high) if tick > 0]
        axes.set_ylim(min(low, ticks[0]), max(high, ticks[-1]))
        axes.yaxis.set_major_locator(rounded)


def _cut(axes: Axes, top: float) -> None:
    """Show nothing above ``top``, if something lies below it and something above."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervaly
    if low < top < high:
        rounded = MaxNLocator(5, steps=[1, 2, 5, 10])
        axes.set_ylim(max(tick for tick in rounded.tick_values(low, top) if tick <= low), top)
        axes.yaxis.set_major_locator(rounded)
        for line in axes.get_lines():
            line.set(clip_on=True, clip_path=axes.patch)


def _name_ends(axes: Axes, drawn: Mapping[str, Sequence[_Point]]) -> None:
    """The name of every curve right of the axes, at the height of its last point or as near as there is room, and a thin line to it."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # which from now on nothing changes
    to_axes = axes.transData + axes.transAxes.inverted()
    gap = LINE_HEIGHT / (
        axes.figure.get_figheight() - 0.7
    )  # of the height of the axes, which the labels of x take from
    ends, top = [], axes.get_ylim()[1]
    for name, points in drawn.items():
        last = [point for point in points if math.isfinite(point.mean)][-1]
        ends.append((*to_axes.transform((last.x, min(last.mean, top))), name))
    heights = _spread([up for _, up, _ in ends], gap)
    for (across, up, name), height, line in zip(ends, heights, _named(axes), strict=True):
        colour = line.get_color()
        thin = {"color": colour, "linewidth": 0.8, "linestyle": ":", "clip_on": False, "label": "_to"}
        if up < 1 - 1e-9:  # a line that leaves the picture has no end to point at
            (leader,) = axes.plot([across, 1.025], [up, height], transform=axes.transAxes, **thin)
            leader.set_in_layout(False)
        axes.text(1.03, height, plain_text(name), color=colour, va="center", transform=axes.transAxes)


def _named(axes: Axes) -> list[Any]:
    return [line for line in axes.get_lines() if not line.get_label().startswith("_")]


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights near the wanted ones, no two closer than ``gap``: neighbours that would be are set around their middle."""
    groups: list[list[int]] = []
    places = list(wanted)

    def middle(group: list[int]) -> float:
        return sum(wanted[at] for at in group) / len(group)

    for at in sorted(range(len(wanted)), key=lambda at: wanted[at]):
        groups.append([at])
        while (
            len(groups) > 1 and middle(groups[-1]) - middle(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    for group in groups:
        for order, at in enumerate(group):
            places[at] = middle(group) + gap * (order - (len(group) - 1) / 2)
    return places
