"""Names beside what they name, in its colour: at the ends of lines, and at points. A reader need not look back at a legend.

How much room a text takes is estimated (``canvas.CHARACTER``), so that no figure has to be drawn to find the places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from minilora.report.canvas import CHARACTER, LINE, LINE_HEIGHT
from minilora.report.tables import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["End", "Spot", "add_ends", "add_names", "clipped", "fit", "spread_out"]

SHARE = 0.3  # of the width of a figure, that names at the right may take
LONGEST = 34  # signs of a name
GAP = 0.09  # inches between a point and its name

End = tuple[str, float, float, str]  # name, x and y of where its line ends, colour
Spot = tuple[str, float, float, str]  # name, x and y of its point, colour; without a name: only not to be covered
Box = tuple[float, float, float, float]


def clipped(name: str) -> str:
    """At most ``LONGEST`` signs, with both ends of the name."""
    text = plain_text(name)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}…{text[-LONGEST // 2 :]}"


def fit(names: Iterable[str], width: float) -> bool:
    """Whether names find room at the right of a figure of ``width`` inches."""
    return CHARACTER * max((len(clipped(name)) for name in names), default=0) <= SHARE * width


def add_ends(axes: Axes, ends: Sequence[End], height: float) -> None:
    """The name of each line at the right of the axes, as high as the line ends; a thin line leads there where it had to move.

    Args:
        height: of the axes, in inches, about. Call it when the limits of the axes are set.
    """
    wanted = [_share(axes, y) for _, _, y, _ in ends]
    places = spread_out(wanted, LINE_HEIGHT / height)
    right = axes.get_xlim()[1]
    for (name, x, y, colour), own, place in zip(ends, wanted, places, strict=True):
        if abs(place - own) > 0.02 or x < right:
            lead = {"arrowstyle": "-", "linewidth": 0.75, "color": LINE, "shrinkA": 0, "shrinkB": 5}
            axes.annotate(
                "", (x, y), (1.015, place), textcoords="axes fraction", arrowprops=lead, annotation_clip=False
            )
        axes.annotate(clipped(name), (1.025, place), xycoords="axes fraction", color=colour, va="center")


def _share(axes: Axes, y: float) -> float:
    """How high ``y`` is, as a share of the axes."""
    (low, high), scale = axes.get_ylim(), axes.yaxis.get_transform()
    bottom, top, at = (float(scale.transform([value])[0]) for value in (low, high, y))
    return min(1.0, max(0.0, (at - bottom) / (top - bottom)))


def spread_out(wanted: Sequence[float], apart: float) -> list[float]:
    """Places between 0 and 1 near those wanted, in their order, at least ``apart`` from each other or, if there is no room, equally."""
    apart = min(apart, 1 / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    places = [wanted[at] for at in order]
    for at in range(1, len(places)):
        places[at] = max(places[at], places[at - 1] + apart)
    most = 1.0
    for at in reversed(range(len(places))):
        places[at] = min(places[at], most)
        most = places[at] - apart
    found = dict(zip(order, places, strict=True))
    return [found[at] for at in range(len(wanted))]


def add_names(axes: Axes, spots: Sequence[Spot], size: tuple[float, float]) -> None:
    """The name of each point beside it, where it covers no other name and no point.

    Args:
        size: width and height of the axes, in inches, about. Call it when the limits of the (linear) axes are set.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    at = [((x - left) / (right - left) * size[0], (y - bottom) / (top - bottom) * size[1]) for _, x, y, _ in spots]
    taken: list[Box] = [(x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in at]
    for (name, x, y, colour), place in zip(spots, at, strict=True):
        if name:
            box = _free(place, CHARACTER * len(clipped(name)), taken, size)
            taken.append(box)
            offset = (72 * (box[0] - place[0]), 72 * ((box[1] + box[3]) / 2 - place[1]))
            axes.annotate(clipped(name), (x, y), offset, textcoords="offset points", color=colour, va="center")


def _free(place: tuple[float, float], length: float, taken: Sequence[Box], size: tuple[float, float]) -> Box:
    """The box for a text near a place that covers the least."""
    x, y = place
    boxes = []
    for far in (1, 2, 3, 4):
        up = LINE_HEIGHT * (far - 1)
        sides = (x + GAP, x - GAP - length)
        boxes += [(left, y + way * up - LINE_HEIGHT / 2) for way, left in itertools.product((1, -1), sides)]
        boxes += [(x - length / 2, y + way * (GAP + up + LINE_HEIGHT / 2) - LINE_HEIGHT / 2) for way in (1, -1)]
    full = [(left, low, left + length, low + LINE_HEIGHT) for left, low in boxes]
    return min(full, key=lambda box: sum(_covers(box, other) for other in taken) + 3 * _outside(box, size))


def _covers(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _outside(box: Box, size: tuple[float, float]) -> bool:
    return box[0] < 0 or box[1] < 0 or box[2] > size[0] + 0.3 or box[3] > size[1] + 0.1
