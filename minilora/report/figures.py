"""Figures of a run and of an adapter, for a page and for a paper: every function returns a ``matplotlib.figure.Figure``.

    records = [json.loads(line) for line in open("runs/mine/log.jsonl")]  # or what ``train`` returned
    figure = loss_figure(records)
    figure.axes[0].set_ylim(1, 3)
    figure.savefig("loss.pdf")

A figure stands alone: no window, no ``pyplot``, nothing to close. ``width`` is in inches, the height follows from it and from what is
drawn, type is of 9 points. Numbers that are not finite are gaps. Without matplotlib (the extra ``plot``) each function raises
``MissingPackageError``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from minilora.report.canvas import LINE_HEIGHT, NARROW, WIDE, Point, add_legend, add_line, canvas, check, finish
from minilora.report.heatmap import has_index, heat_map
from minilora.report.inspect import memory_table, spectra, update_ratios
from minilora.report.svg import SERIES
from minilora.report.tables import Row, as_number, finite_pairs, human_bytes, most_of, plain_text, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "bar_figure",
    "compare_figure",
    "curve_figure",
    "layer_figure",
    "loss_figure",
    "memory_figure",
    "runs_figure",
    "spectrum_figure",
]

STEP, NATS, RATIO = "optimizer step", "loss (nats per token)", "‖ΔW‖ / ‖W‖"
CURVES = {  # key of a record: what it is, and the label of its axis
    "lr": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm", "L2 norm, all trained parameters"),
    "tokens_per_s": ("Throughput", "tokens per second"),
    "rss_mb": ("Memory of the process", "resident memory (MB)"),
}


# ---- curves


def measured(records: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """``(step, value)`` of every record that has ``key``; ``None`` is "not measured here"."""
    return [(float(record["step"]), as_number(record[key])) for record in records if record.get(key) is not None]


def loss_figure(records: Sequence[Mapping[str, Any]], *, width: float = WIDE) -> Figure:
    """The training loss of each step, its centred mean where steps are many, and the evaluations.

    Args:
        records: lines of ``log.jsonl``: with ``step`` and ``loss`` or ``eval_loss``, in nats per token; others are passed over.

    Raises:
        ConfigError: no record has a finite loss.
    """
    losses, evals = measured(records, "loss"), measured(records, "eval_loss")
    check("loss", losses + evals)
    span = min(101, max(5, len(losses) // 25 | 1))  # odd: as many steps before as after
    smooth = smoothed(losses, span) if len(losses) > 2 * span else []
    with canvas(width, max(2.2, 0.58 * width)) as (figure, axes):
        thin = {"linewidth": 0.8, "alpha": 0.55} if smooth else {}
        if losses:
            add_line(axes, "training, each step", losses, SERIES[0], **thin)
        if smooth:
            add_line(axes, f"mean of {span} steps", smooth, SERIES[0])
        if evals:
            add_line(axes, "evaluation", evals, SERIES[1], linestyle="none")
        finish(figure, axes, STEP, NATS)
    return figure


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """Centred mean, so that the smooth line does not lag behind a falling one; gaps stay gaps."""
    smooth = []
    for index, (step, value) in enumerate(points):
        reach = min(span // 2, index, len(points) - 1 - index)
        around = finite_pairs(points[index - reach : index + reach + 1])
        smooth.append((step, sum(near for _, near in around) / len(around) if math.isfinite(value) else math.nan))
    return smooth


def curve_figure(records: Sequence[Mapping[str, Any]], key: str, *, width: float = NARROW) -> Figure:
    """One measure by step: ``lr``, ``grad_norm``, ``tokens_per_s``, ``rss_mb``, or any other number of the records.

    Raises:
        ConfigError: no record has a finite number of that name.
    """
    points, (name, label) = measured(records, key), CURVES.get(key, (key, key))
    check(key, points)
    with canvas(width, 0.57 * width) as (figure, axes):
        add_line(axes, name, points, SERIES[0], linewidth=1.1)
        finish(figure, axes, STEP, label)
    return figure


def compare_figure(runs: Mapping[str, Sequence[float]], *, width: float = WIDE) -> Figure:
    """Losses of several runs, ``{name: loss of each step}``: the first as a line, the others as points on it or off it.

    Raises:
        ConfigError: no loss is finite.
    """
    lines = {name: [(at + 1.0, as_number(loss)) for at, loss in enumerate(losses)] for name, losses in runs.items()}
    check("loss", [point for points in lines.values() for point in points])
    with canvas(width, max(2.2, 0.42 * width)) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            add_line(axes, name, points, SERIES[place % len(SERIES)], linestyle="none" if place else "-")
        finish(figure, axes, STEP, NATS)
    return figure


def runs_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, width: float = WIDE) -> Figure:
    """The losses of several runs by step, a colour each: training as a line (its centred mean where steps are many), held-out as points.

    Args:
        runs: name to records, as for ``loss_figure``.

    Raises:
        ConfigError: no record has a finite loss.
    """
    lines = {name: (measured(records, "loss"), measured(records, "eval_loss")) for name, records in runs.items()}
    check("loss", [point for pair in lines.values() for points in pair for point in points])
    with canvas(width, max(2.2, 0.5 * width)) as (figure, axes):
        for place, (name, (losses, evals)) in enumerate(lines.items()):
            colour, span = SERIES[place % len(SERIES)], min(101, max(5, len(losses) // 25 | 1))
            if losses:
                add_line(axes, name, smoothed(losses, span) if len(losses) > 2 * span else losses, colour)
            if evals:
                add_line(axes, f"{name}, held out", evals, colour, linestyle="none")
        finish(figure, axes, STEP, NATS)
    return figure


def spectrum_figure(
    model: nn.Module | Mapping[str, Sequence[float]], adapter_name: str = "default", *, width: float = WIDE
) -> Figure:
    """Singular values of updates, largest first, on a log axis: one that falls early uses fewer directions than its rank allows.

    Args:
        model: one with adapters, of which the four layers that moved most are drawn; or ``{path: singular values}``.

    Raises:
        ConfigError: no value is above 0, as before training. StateError: no such adapter.
    """
    given = spectra(model, adapter_name) if isinstance(model, nn.Module) else model
    lines = {
        path: [(rank, value if value > 0 else math.nan) for rank, value in ranked(values)]
        for path, values in given.items()
    }
    check("singular values above 0", [point for points in lines.values() for point in points])
    with canvas(width, max(2.2, 0.46 * width)) as (figure, axes):
        axes.set_yscale("log")
        for place, (path, points) in enumerate(lines.items()):
            style = "--" if place // len(SERIES) % 2 else "-"
            add_line(axes, path, points, SERIES[place % len(SERIES)], linestyle=style)
        finish(figure, axes, "rank, largest first", "singular value, log scale")
    return figure


def ranked(values: Iterable[Any]) -> list[Point]:
    """``(rank, value)``, from rank 1."""
    return [(float(rank), as_number(value)) for rank, value in enumerate(values, 1)]


# ---- bars


def memory_figure(model: nn.Module | Sequence[Mapping[str, Any]], *, width: float = WIDE) -> Figure:
    """What a step holds, as bars in bytes.

    Args:
        model: what ``inspect.memory_table`` reads; or rows with ``name`` and ``bytes``.
    """
    rows = memory_table(model) if isinstance(model, nn.Module) else model
    sizes = [(str(row["name"]), as_number(row["bytes"])) for row in rows]
    return bar_figure([""], [Row(name, [human_bytes(size)], [size]) for name, size in sizes], width=width)


def bar_figure(columns: Sequence[str], rows: Sequence[Row], *, width: float = WIDE) -> Figure:
    """A bar for each value of each row, coloured by its column, with the row's text at its end.

    Bars are as long as their values; where the rows have several groups, as long as their share of the largest of their group.

    Raises:
        ConfigError: no row has a finite value.
    """
    drawn = [row for row in rows if any(value is not None for value in row.values)]
    check("bars", [(row.name, value) for row in drawn for value in row.values if value is not None])
    names = [textwrap.wrap(plain_text(row.name).strip(), max(12, int(6 * width))) for row in drawn]
    many = max(sum(value is not None for value in row.values) for row in drawn)
    tall = LINE_HEIGHT * max(many, *map(len, names)) + 0.13  # inches of a row
    with canvas(width, tall * len(drawn) + 0.1) as (figure, axes):
        axes.set(xlim=(0, _bars(axes, columns, drawn, LINE_HEIGHT / tall)), ylim=(len(drawn) - 0.5, -0.5))
        axes.set_yticks(range(len(drawn)), ["\n".join(name) for name in names])
        axes.spines[:].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.grid(visible=False)
        if len(axes.containers) > 1:
            add_legend(figure, axes.containers)
    return figure


def _bars(axes: Axes, columns: Sequence[str], rows: Sequence[Row], thick: float) -> float:
    """Draw the bars of every column, those of a row under each other; returns the length of the longest."""
    grouped = len({row.group for row in rows}) > 1
    drawn: dict[int, list[tuple[float, float, str]]] = {}  # column to the height, length and text of its bars
    for at, row in enumerate(rows):
        here = [(place, value) for place, value in enumerate(row.values) if value is not None]
        scale = most_of(rows, row.group) if grouped else 1.0
        for order, (place, value) in enumerate(here):
            length = max(0.0, value / scale) if math.isfinite(value) else 0.0
            up = at + thick * (order - (len(here) - 1) / 2)
            drawn.setdefault(place, []).append((up, length, plain_text(row.texts[place])))
    for place, bars in sorted(drawn.items()):
        heights, lengths, texts = zip(*bars, strict=True)
        colour, label = SERIES[place % len(SERIES)], plain_text(columns[place])
        box = axes.barh(heights, lengths, 0.75 * thick, color=colour, label=label, clip_on=False)
        axes.bar_label(box, texts, padding=4)
    return max(length for bars in drawn.values() for _, length, _ in bars) or 1.0


# ---- how far each layer moved


def layer_figure(
    model: nn.Module | Mapping[str, float], adapter_name: str = "default", *, width: float = WIDE
) -> Figure:
    """How far each layer moved, ``||delta W|| / ||W||``: a row for each kind of layer, a column for each layer index.

    Layers that moved far more than the rest do not set the scale (``heatmap.scale_of``): they are orange, and the scale ends with an arrow.
    A ratio that is not finite is an empty frame. Without an index in any path, each layer has a bar instead.

    Args:
        model: one with adapters, or ``{path: ratio}``.
        width: what there is; the figure takes less for few layers, and more where a column would be too narrow to see.

    Raises:
        ConfigError: no ratio is finite. StateError: no such adapter.
    """
    ratios = update_ratios(model, adapter_name) if isinstance(model, nn.Module) else model
    layers = [(path, as_number(ratio)) for path, ratio in ratios.items()]
    check(RATIO, layers)
    if not has_index(ratios):
        return bar_figure([RATIO], [Row(path, [short_number(ratio)], [ratio]) for path, ratio in layers], width=width)
    return heat_map(layers, width, RATIO)
