"""What every figure shares: its look, its lines with their gaps, and axes with round numbers.

The look holds while a figure is made and is in its artists afterwards; matplotlib's own settings stay as they were. Nothing here
imports matplotlib before a figure is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minilora.errors import ConfigError, MissingPackageError
from minilora.report.svg import COLOURS, hover
from minilora.report.tables import finite_pairs, plain_text, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CHARACTER",
    "LINE_HEIGHT",
    "PAGE",
    "SOFT",
    "Point",
    "add_legend",
    "add_line",
    "canvas",
    "check",
    "finish",
    "missing",
]

Point = tuple[float, float]
WIDE, NARROW = 7.2, 3.5  # inches: two thirds of a page, and a phone
FEW = 10  # points of a line that are shown one by one
CHARACTER = 0.075  # inches that a character of 9 points takes, on average and rounded up
LINE_HEIGHT = 0.17  # inches that a line of text takes, and a bar with its gap
PAGE, SOFT, LINE = (COLOURS[name][0] for name in ("page", "soft", "line"))
LOOK = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "text.color": SOFT, "axes.labelcolor": SOFT, "axes.titlecolor": SOFT, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "xtick.color": LINE, "ytick.color": LINE, "axes.edgecolor": LINE, "grid.color": LINE, "axes.facecolor": "none",
    "figure.facecolor": "white", "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.linewidth": 0.75,
    "axes.linewidth": 0.75, "xtick.major.size": 3, "ytick.major.size": 0, "ytick.minor.size": 0, "ytick.major.pad": 6,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False,
    "lines.linewidth": 1.6, "lines.markersize": 6.5, "lines.solid_capstyle": "round", "axes.xmargin": 0, "axes.ymargin": 0,
    "axes.autolimit_mode": "round_numbers", "text.parse_math": False, "text.usetex": False,
    "path.simplify": True, "path.simplify_threshold": 0.5,  # points: ten thousand steps stay a small file, and no spike is lost
}  # fmt: skip


def missing() -> str:
    """Why nothing can be drawn here, and the way out, in a line; "" where matplotlib is installed."""
    try:
        import matplotlib
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f'matplotlib, which draws them, cannot be imported ({error}); pip install "minilora[plot]" brings it'
    return ""


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of ``width`` by ``height`` inches with one pair of axes. Raises ``MissingPackageError``."""
    if why := missing():
        raise MissingPackageError(f"no figures: {why}")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure((width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.07)
        yield figure, figure.add_subplot()


def check(what: str, pairs: Sequence[tuple[Any, float]]) -> None:
    """Refuse what would be an empty picture. Raises ``ConfigError``."""
    if not finite_pairs(pairs):
        raise ConfigError(f"{what}: none of {len(pairs)} values can be drawn; wanted at least one finite number")


def add_line(axes: Axes, name: str, points: Sequence[Point], colour: str, **style: Any) -> None:
    """A line with gaps. Points are marked where no line shows them: between two gaps, in a short run, or if the style has none."""
    there = [math.isfinite(value) for _, value in points]
    every = style.get("linestyle") == "none" or len(points) <= FEW
    marked = [at for at, here in enumerate(there) if here and (every or _alone(there, at))]
    values = [value if here else math.nan for (_, value), here in zip(points, there, strict=True)]
    (line,) = axes.plot([x for x, _ in points], values, color=colour, label=plain_text(name), clip_on=False, **style)
    if marked:
        line.set(marker="o", markevery=marked, markeredgecolor=PAGE, markeredgewidth=1.1)
        hover(line, [f"{name}, {points[at][0]:.0f}: {short_number(points[at][1])}" for at in marked])


def _alone(there: Sequence[bool], at: int) -> bool:
    return not any(there[max(0, at - 1) : at]) and not any(there[at + 1 : at + 2])


def finish(figure: Figure, axes: Axes, x: str, y: str, *, whole: bool = True, legend: bool = True) -> None:
    """Label the axes, end them where the data do, put round numbers on them; a legend if there are several lines.

    ``whole``: what is counted along the x axis, such as steps, has no fractions. ``legend``: False where the caller adds another.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lines = axes.get_lines()
    at = [float(value) for line in lines for value in line.get_xdata()]
    alone = 0.5 * (min(at) == max(at))
    axes.set_xlim(min(at) - alone, max(at) + alone)
    _height(axes, [float(value) for line in lines for value in line.get_ydata() if math.isfinite(value)])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=whole, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if whole else short_number(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, *axes.get_ylim())))
    axes.set_xlabel(x)
    axes.set_title(y, loc="left")
    if legend and len(lines) > 1:
        add_legend(figure, lines)


def _height(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(values), max(values)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if axes.get_yscale() == "log":
        few = math.log10(high) - math.log10(low) < 2
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.minorticks_off()
    elif high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant, or rounding noise around one, lies in the middle
        axes.set_ylim(min(0.0, 2 * low), max(0.0, 2 * high) or float(low == 0))
    axes.autoscale_view(scalex=False)  # now, while the look holds: to the ticks around the data


def _tick(value: float, low: float, high: float) -> str:
    if abs(value) < 1e-9 * abs(high - low):
        return "0"
    small = max(abs(low), abs(high)) < 0.001
    return re.sub(r"\.?0+e", "e", short_number(value, ".9e")) if small else short_number(value, ",.10g")


def add_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Above the axes, in as many columns as find room; the figure grows by its height."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (CHARACTER * longest + 0.4))))
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * math.ceil(len(handles) / columns) + 0.07)
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, borderpad=0, handlelength=1.6, columnspacing=1.4
    )
