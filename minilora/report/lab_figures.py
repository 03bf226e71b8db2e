"""Figures of what ``minilora.lab.measures`` finds: like those of ``figures.py``, each function returns a ``matplotlib.figure.Figure``.

    from minilora.lab.measures import landscape, spectrum
    from minilora.report.lab_figures import landscape_figure, spectra_figure

    spectra_figure(spectrum(model)).savefig("spectra.pdf")
    landscape_figure({"rank 8": landscape(model, examples)}).savefig("landscape.pdf")

They take plain numbers, so a figure can be drawn again from a file. Layers of one kind (the last part of their paths) have one colour:
each is a pale line, and their median the strong one.
Without matplotlib (the extra ``plot``) each function raises ``MissingPackageError``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minilora.errors import ConfigError, nearest
from minilora.report.canvas import NARROW, PAGE, SOFT, WIDE, Point, add_legend, add_line, canvas, check, finish
from minilora.report.figures import NATS, RATIO, STEP, ranked
from minilora.report.heatmap import grid_of, shades
from minilora.report.svg import SERIES
from minilora.report.tables import as_number, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["landscape_figure", "norms_figure", "similarity_figure", "spectra_figure"]

NORMS = {  # column of ``Norms.rows``: the label of its axis
    "update_norm": "‖ΔW‖ (Frobenius norm)",
    "relative": RATIO,
    "grad_norm": "L2 norm of the adapter's gradient in a layer",
}


def spectra_figure(spectra: Mapping[str, Iterable[Any]], *, width: float = WIDE) -> Figure:
    """The singular values of every layer's update, largest first, on a log axis: a colour a kind of layer.

    Args:
        spectra: path to singular values, as ``lab.measures.spectrum(model)``. Values of 0 are gaps.

    Raises:
        ConfigError: no value is above 0, as before training.
    """
    lines = {
        path: [(rank, value if value > 0 else math.nan) for rank, value in ranked(values)]
        for path, values in spectra.items()
    }
    check("singular values above 0", [point for points in lines.values() for point in points])
    with canvas(width, max(2.2, 0.46 * width)) as (figure, axes):
        axes.set_yscale("log")
        _draw_layers(figure, axes, lines, "rank, largest first", "singular value of ΔW, log scale")
    return figure


def norms_figure(rows: Sequence[Mapping[str, Any]], column: str = "update_norm", *, width: float = WIDE) -> Figure:
    """A norm of every layer by step, a colour a kind of layer.

    Args:
        rows: of ``lab.measures.Norms``, or as ``csv.DictReader`` gives them back. column: "update_norm", "relative" or "grad_norm".

    Raises:
        ConfigError: another column, or one without a finite number.
    """
    if column not in NORMS:
        raise ConfigError(f"column={column!r}: wanted one of {nearest(column, NORMS)}")
    lines: dict[str, list[Point]] = {}
    for row in rows:
        if row[column] not in (None, ""):  # which is how a CSV file has None
            lines.setdefault(str(row["layer"]), []).append((float(row["step"]), as_number(row[column])))
    check(column, [point for points in lines.values() for point in points])
    with canvas(width, max(2.2, 0.46 * width)) as (figure, axes):
        _draw_layers(figure, axes, lines, STEP, NORMS[column])
    return figure


def _draw_layers(figure: Figure, axes: Axes, lines: Mapping[str, Sequence[Point]], x: str, y: str) -> None:
    """A line for each path or, where a kind of layer has several, their median over pale lines; and a legend of the kinds."""
    places, names, _ = grid_of(list(lines))
    kinds: dict[int, list[Sequence[Point]]] = {}
    for (kind, _), points in zip(places, lines.values(), strict=True):
        kinds.setdefault(kind, []).append(points)
    for kind, each in kinds.items():
        for points in each if len(each) > 1 else ():
            pale = {"linewidth": 0.6, "alpha": 0.18}
            axes.plot(*zip(*points, strict=True), color=SERIES[kind % len(SERIES)], clip_on=False, **pale)
    drawn = []
    for kind, each in kinds.items():
        name = names[kind] if len(each) == 1 else f"{names[kind]} (median of {len(each)})"
        style = {"linestyle": "--" if kind // len(SERIES) % 2 else "-"}
        add_line(axes, name, _median(each), SERIES[kind % len(SERIES)], **style)
        drawn.append(axes.get_lines()[-1])
    finish(figure, axes, x, y, legend=False)
    add_legend(figure, drawn)


def _median(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """At each place the median of the lines that have a finite value there."""
    at: dict[float, list[float]] = {}
    for place, value in (point for points in lines for point in points):
        at.setdefault(place, []).extend([value] if math.isfinite(value) else [])
    return [(place, statistics.median(values) if values else math.nan) for place, values in sorted(at.items())]


def landscape_figure(curves: Mapping[str, Iterable[Point]] | Iterable[Point], *, width: float = WIDE) -> Figure:
    """The loss along ``W + t ΔW``, with marks at the base model (t = 0) and the adapted one (t = 1).

    Args:
        curves: ``(t, loss)`` as ``lab.measures.landscape`` returns it, or several of them by name.

    Raises:
        ConfigError: no loss is finite.
    """
    named = curves if isinstance(curves, Mapping) else {"": curves}
    lines = {name: sorted((float(t), as_number(loss)) for t, loss in points) for name, points in named.items()}
    check("loss", [point for points in lines.values() for point in points])
    with canvas(width, max(2.2, 0.46 * width)) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            add_line(axes, name, points, SERIES[place % len(SERIES)])
        finish(figure, axes, "t, the share of the update", NATS, whole=False)
        _mark_ends(axes)
    return figure


def _mark_ends(axes: Axes) -> None:
    """A thin upright line at the base model and at the adapted one, and their names under the numbers 0 and 1."""
    from matplotlib.ticker import FuncFormatter

    low, high = axes.get_xlim()
    ends, plain = {0.0: "base", 1.0: "adapted"}, axes.xaxis.get_major_formatter()
    for t in (t for t in ends if low < t < high):
        axes.axvline(t, color=SOFT, linewidth=0.75, dashes=(2, 3), zorder=0.5)

    def tick(value: float, at: int | None = None) -> str:
        return f"{plain(value, at)}\n{ends.get(round(value, 9), '')}".rstrip()

    axes.xaxis.set_major_formatter(FuncFormatter(tick))


def similarity_figure(grid: Any, names: tuple[str, str] = ("first", "second"), *, width: float = NARROW) -> Figure:
    """``phi(i, j)`` as squares, dark where the first i directions of one adapter and the first j of the other are the same.

    Args:
        grid: ``[rank of the first, rank of the second]`` in [0, 1], as ``lab.measures.similarity_grid`` returns it. names: of the two.

    Raises:
        ConfigError: not two dimensions, or a value outside of [0, 1].
    """
    values = [[float(value) for value in row] for row in grid]
    if not values or len({len(row) for row in values}) != 1 or not values[0]:
        raise ConfigError("grid: wanted two dimensions, i down and j across")
    if not all(-1e-6 <= value <= 1 + 1e-6 for row in values for value in row):
        raise ConfigError("grid: wanted similarities in [0, 1]")
    rows, columns = len(values), len(values[0])
    across = (width - 0.5) / columns  # inches of a cell
    down = min(max(across, 1.2 / rows), 1.2 * width / rows)
    with canvas(width, down * rows + 1.2) as (figure, axes):
        edge = 0.75 if min(across, down) > 0.12 else 0
        mesh = axes.pcolormesh(
            values, cmap=shades(), vmin=0, vmax=1, edgecolors=PAGE if edge else "face", linewidth=edge
        )
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xlabel(f"j, directions of {names[1]}", loc="left")
        axes.set_title(f"i, directions of {names[0]}", loc="left")
        for axis, count, least in ((axes.xaxis, columns, 0.3 / across), (axes.yaxis, rows, 0.2 / down)):
            step = next(step for step in (1, 2, 5, 10, 20, 50, 100, count) if step >= min(least, count))
            shown = [at for at in range(1, count + 1) if at % step == 0 or step == 1]
            axis.set_ticks([at - 0.5 for at in shown], [str(at) for at in shown])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=25, shrink=0.8, anchor=(0, 0), drawedges=False)
        bar.outline.set_visible(False)
        bar.set_ticks([0, 0.5, 1], labels=[short_number(value) for value in (0, 0.5, 1)])
        bar.set_label("similarity φ(i, j)", loc="left")
    return figure
