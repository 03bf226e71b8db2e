"""What was learnt against what was forgotten, as points: those that no other beats in both are the frontier of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from minilora.report.canvas import PAGE, SOFT, WIDE, add_legend, canvas, check
from minilora.report.heatmap import scale_of
from minilora.report.labels import add_names, clipped
from minilora.report.svg import hover
from minilora.report.sweep_figures import LOSS, colour_of, dash_of, drawn, round_numbers
from minilora.report.tables import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["frontier", "frontier_figure"]

FORGOTTEN = "forgotten (nats per token)"
FEW = 8  # points that are named one by one
MANY = 6  # families whose names find room beside their points in a narrow figure


class _Spot(NamedTuple):
    place: int  # of its family
    name: str
    forgotten: float
    loss: float
    what: str


def frontier_figure(
    points: Mapping[str, Sequence[tuple[float, float, str]]], *, label: str = LOSS, width: float = WIDE
) -> Figure:
    """What was learnt (a low loss) against what was forgotten; the dashed stairs are the frontier.

    Points that lie far out would press the others together; they are left out, and counted under the axis.

    Args:
        points: name of a family to ``(forgotten, loss, what)`` of its rates, in nats a token; ``what`` says which rate. label: what the
            losses are.

    Raises:
        ConfigError: no point is finite.
    """
    every = [_Spot(place, name, *one) for place, (name, own) in enumerate(points.items()) for one in own]
    finite = [spot for spot in every if drawn(spot.forgotten) and drawn(spot.loss)]
    check("learnt and forgotten", [(spot.name, 0.0 if spot in finite else math.nan) for spot in every])
    right, top = (min(values) + scale_of([value - min(values) for value in values]) for values in _sides(finite))
    shown = [spot for spot in finite if spot.forgotten <= right and spot.loss <= top]
    far = len(finite) - len(shown)
    with canvas(width, max(2.8, 0.5 * width)) as (figure, axes):
        for values, put in zip(_sides(shown), (axes.set_xlim, axes.set_ylim), strict=True):
            margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
            put(min(values) - margin, max(values) + margin)
        _stairs(axes, frontier([(spot.forgotten, spot.loss) for spot in shown]))
        for place in range(len(points)):
            _family(axes, [spot for spot in shown if spot.place == place])
        axes.set_xlabel(FORGOTTEN + f"; {far} far out {'is' if far == 1 else 'are'} not drawn" * bool(far))
        axes.set_title(label, loc="left")
        round_numbers(axes)
        if width < WIDE and len(points) > MANY:
            add_legend(figure, [line for line in axes.get_lines() if not line.get_label().startswith("_")])
        else:
            add_names(axes, _names(shown), (width - 0.65, figure.get_figheight() - 0.8))
    return figure


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of ``(forgotten, loss)`` those that no other has less of both than, by what is forgotten."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _sides(spots: Sequence[_Spot]) -> Iterator[list[float]]:
    yield [spot.forgotten for spot in spots]
    yield [spot.loss for spot in spots]


def _stairs(axes: Axes, kept: Sequence[tuple[float, float]]) -> None:
    look = {"color": SOFT, "linestyle": "--", "linewidth": 0.9, "drawstyle": "steps-post", "zorder": 1.5}
    axes.plot([x for x, _ in kept], [y for _, y in kept], **look)


def _family(axes: Axes, own: Sequence[_Spot]) -> None:
    """Its points, and a thin line through them from rate to rate."""
    if own:
        (x, y), colour = _sides(own), colour_of(own[0].place)
        axes.plot(x, y, color=colour, linestyle=dash_of(own[0].place), linewidth=0.8, alpha=0.5, clip_on=False)
        (marks,) = axes.plot(
            x,
            y,
            "o",
            color=colour,
            label=clipped(own[0].name),
            markeredgecolor=PAGE,
            markeredgewidth=1.1,
            clip_on=False,
        )
        hover(marks, [_told(spot) for spot in own])


def _told(spot: _Spot) -> str:
    return f"{spot.name}, {spot.what}: loss {short_number(spot.loss)}, forgotten {short_number(spot.forgotten)}"


def _names(shown: Sequence[_Spot]) -> list[tuple[str, float, float, str]]:
    """Of few points each is named; of many, of each family the one that learnt most."""
    most = {
        place: min((s for s in shown if s.place == place), key=lambda s: s.loss) for place in {s.place for s in shown}
    }
    each = len(shown) <= FEW
    return [
        (
            f"{spot.name}, {spot.what}" if each else spot.name if spot is most[spot.place] else "",
            spot.forgotten,
            spot.loss,
            colour_of(spot.place),
        )
        for spot in shown
    ]
