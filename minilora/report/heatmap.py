"""How far each layer moved, as a heat map: a row for each kind of layer, a column for each layer index.

One layer that moved far more than the rest would make all others pale. It does not set the scale, and is marked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from minilora.report.canvas import CHARACTER, NARROW, PAGE, SOFT, canvas
from minilora.report.svg import SERIES, hover
from minilora.report.tables import finite_pairs, plain_text, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["beyond_scale", "grid_of", "has_index", "heat_map", "scale_of", "shades"]

MANY = 12  # layers whose quarters say how they are spread
SHADES, PALEST = 16, 0.06  # levels of the scale, and the share of the colour that the lowest has
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a dotted path that is a number


def has_index(paths: Iterable[str]) -> bool:
    """Whether any of the paths has the number of a layer in it."""
    return any(_INDEX.search(path) for path in paths)


def heat_map(layers: Sequence[tuple[str, float]], width: float, label: str) -> Figure:
    """``(path, value)`` of each layer; ``label`` says what the value is. See ``figures.layer_figure``."""
    places, kinds, indices = grid_of([path for path, _ in layers])
    left = CHARACTER * max(map(len, kinds)) + 0.2  # inches of the names
    cell = min(0.46, max(0.08, (width - left) / len(indices)))
    room = max(left + cell * len(indices), min(width, NARROW)) - left
    with canvas(left + room, 0.29 * len(kinds) + 0.95) as (figure, axes):
        axes.set(xlim=(0, room / cell), ylim=(len(kinds), 0))
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
        shown = range(0, len(indices), math.ceil(0.3 / cell))  # only as many numbers as find room
        names = ["none" if indices[at] is None else str(indices[at]) for at in shown]
        axes.set_xticks([column + 0.5 for column in shown], names)
        axes.set_xlabel("layer index", loc="left")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        _cells(figure, axes, layers, places, label, min(1.0, 3 / room))
    return figure


def grid_of(paths: Sequence[str]) -> tuple[list[tuple[int, int]], list[str], list[int | None]]:
    """``(row, column)`` of each path, the names of the rows and the layer indices of the columns.

    A row is the last part of the path; where two layers would share a cell, it is the whole path but for the index.
    """
    found = [_INDEX.search(path) for path in paths]
    indices = [int(match[0]) if match else None for match in found]
    kinds = [path.rsplit(".", 1)[-1] for path in paths]
    if len(set(zip(kinds, indices, strict=True))) < len(paths):
        kinds = [_INDEX.sub("*", path, count=1) for path in paths]
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(indices), key=lambda index: (index is None, index or 0))
    places = [(rows.index(kind), columns.index(index)) for kind, index in zip(kinds, indices, strict=True)]
    return places, [_clipped(plain_text(row)) for row in rows], columns


def beyond_scale(layers: Sequence[tuple[str, float]]) -> list[str]:
    """The paths that the heat map draws in orange, as beyond its scale; none where there is no heat map."""
    seen = finite_pairs(layers) if has_index(path for path, _ in layers) else []
    return [path for path, value in seen if value > scale_of([value for _, value in seen])]


def scale_of(values: Sequence[float]) -> float:
    """The end of the colour scale: the largest finite value that is no outlier, so that one layer does not make all others pale.

    An outlier lies beyond Tukey's outer fence, three times the spread of the middle half above its upper end (J. W. Tukey, Exploratory
    Data Analysis, 1977, chapter 2), and beyond one and a half times that end; of few layers, whose quarters say little, beyond four times.
    """
    seen = sorted(value for value in values if math.isfinite(value))
    lower, upper = (seen[part * (len(seen) - 1) // 4] for part in (1, 3))
    fence = max(upper + 3 * (upper - lower), (1.5 if len(seen) >= MANY else 4) * upper)
    return max(value for value in seen if value <= fence) or seen[-1] or 1.0


def shades() -> Any:
    """The colours of a heat map, from pale to full: a matplotlib colour map of few levels."""
    from matplotlib.colors import ListedColormap, to_rgba

    alphas = [PALEST + (1 - PALEST) * level / (SHADES - 1) for level in range(SHADES)]
    return ListedColormap([to_rgba(SERIES[0], alpha) for alpha in alphas])


def _cells(
    figure: Figure,
    axes: Axes,
    layers: Sequence[tuple[str, float]],
    places: Sequence[tuple[int, int]],
    label: str,
    share: float,
) -> None:
    """A rectangle for each layer, and the scale of their colours under ``share`` of the axes."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    known = [math.isfinite(value) for _, value in layers]
    top, beyond = scale_of([value for _, value in layers]), bool(beyond_scale(layers))
    cells = PatchCollection(
        [Rectangle((column + 0.04, row + 0.04), 0.92, 0.92) for row, column in places],
        cmap=shades().with_extremes(over=SERIES[1], bad="none"),
        edgecolors=["none" if here else SOFT for here in known],
        linestyles=["-" if here else (0, (3, 3)) for here in known],
        clip_on=False,
    )
    cells.set(
        array=[value if here else math.nan for (_, value), here in zip(layers, known, strict=True)], clim=(0, top)
    )
    hover(cells, [f"{path}: {short_number(value)}" for path, value in layers])
    axes.add_collection(cells, autolim=False)
    where = {"location": "bottom", "shrink": share, "aspect": 25, "anchor": (0, 0)}
    bar = figure.colorbar(cells, ax=axes, drawedges=True, extend="max" if beyond else "neither", **where)
    bar.dividers.set_color(PAGE)
    bar.outline.set_visible(False)
    bar.set_ticks([part * top for part in (0, 0.5, 1)], labels=[short_number(part * top) for part in (0, 0.5, 1)])
    bar.set_label(label + ", orange: beyond the scale" * beyond, loc="left")


def _clipped(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:9]}…{name[-16:]}"  # both ends tell one layer from another
