"""The figures of a sweep hold the right numbers, mark what diverged, and stay legible with one rate and with twelve families."""

import itertools
import math
import sys

import pytest

from minilora.errors import ConfigError, MissingPackageError
from minilora.report.frontier import frontier, frontier_figure
from minilora.report.labels import spread_out
from minilora.report.svg import SERIES, inline_svg
from minilora.report.sweep_figures import rate_figure, regret_figure

matplotlib = pytest.importorskip("matplotlib")

nan = math.nan
LOSSES = {
    "r=4": {0.01: [1.2, 1.4], 0.001: [1.5, 1.7], 0.1: [nan, nan]},
    "r=16": {0.001: [1.4, 1.5], 0.01: [1.0, 1.2], 0.1: [1.9, nan]},
}
MANY = {f"dora r={r}": {10.0**-p: [2 + r / 9 + p / 5, 2.05 + r / 9 + p / 5] for p in range(1, 5)} for r in range(12)}


def lines(figure):
    """The lines of the families by name, without gaps."""
    drawn = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [tuple(p) for p in line.get_xydata().tolist() if not math.isnan(p[1])] for line in drawn}


def close(points):
    return [pytest.approx(point) for point in points]


def marks(figure, marker):
    """``(rate, colour)`` of the marks above the axes."""
    found = [line for line in figure.axes[0].get_lines() if line.get_marker() == marker]
    return [(float(line.get_xdata()[0]), line.get_color()) for line in found]


def texts(figure):
    """The texts that are seen, and their boxes; a tick beyond the ends of its axis is not drawn."""
    figure.draw_without_rendering()
    hidden = set()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        low, high = sorted(axis.get_view_interval())
        hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    every = figure.findobj(matplotlib.text.Text)
    seen = [text for text in every if text.get_visible() and text.get_text() and text not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in seen]


def ticks(axis):
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    places = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    return axis.get_major_formatter().format_ticks(places)


# ---- loss by rate


def test_lines_are_means_in_the_order_of_the_rates():
    figure = rate_figure(LOSSES)
    assert lines(figure) == {
        "r=4": close([(0.001, 1.6), (0.01, 1.3)]),
        "r=16": close([(0.001, 1.45), (0.01, 1.1), (0.1, 1.9)]),
    }
    assert figure.axes[0].get_xscale() == "log" and ticks(figure.axes[0].xaxis) == ["0.001", "0.01", "0.1"]
    assert {"r=4", "r=16", "learning rate", "loss (nats per token)", "diverged"} <= {text for text, _ in texts(figure)}


def test_the_band_reaches_from_the_lowest_seed_to_the_highest():
    first, _ = (
        rate_figure({"a": {0.1: [1.0, 2.0, nan], 0.2: [3.0, 3.5]}, "b": {0.1: [2.0], 0.2: [2.0]}}).axes[0].collections
    )
    assert {tuple(corner) for corner in first.get_paths()[0].vertices.tolist()} >= {(0.1, 1.0), (0.1, 2.0), (0.2, 3.0)}
    alone = rate_figure({"a": {0.1: [1.0, 2.0, 1.5]}}).axes[0]
    assert [1.0, 2.0] in [list(line.get_ydata()) for line in alone.get_lines()] and not alone.collections


def test_a_trial_that_diverged_is_a_cross_of_its_colour_above_the_axes():
    assert marks(rate_figure(LOSSES), "X") == [(0.1, SERIES[0]), (0.1, SERIES[1])]
    assert marks(regret_figure(LOSSES), "X") == [(0.1, SERIES[0]), (0.1, SERIES[1])]
    svg = inline_svg(rate_figure(LOSSES), "words that say what it shows")
    assert "<title>r=4, 0.1: 2 of 2 diverged</title>" in svg and "<title>r=16, 0.1: 1 of 2 diverged</title>" in svg
    assert "<title>r=16, 0.01: 1.1</title>" in svg


def test_a_mean_far_above_does_not_flatten_the_others():
    losses = {"a": {0.001: [1.0], 0.01: [1.1], 0.1: [1.2], 1.0: [41.2]}, "b": {0.001: [1.3], 0.01: [1.2], 0.1: [1.1]}}
    figure = rate_figure(losses)
    assert figure.axes[0].get_ylim() == pytest.approx((1.0, 1.3)) and marks(figure, "^") == [(1.0, SERIES[0])]
    *inside, (rate, loss) = lines(figure)["a"]
    assert inside == [(0.001, 1.0), (0.01, 1.1), (0.1, 1.2)]
    assert loss == pytest.approx(1.3) and math.log10(rate) == pytest.approx(
        -1 + 0.1 / 40
    )  # where the line crosses the top
    assert not marks(regret_figure(losses), "^")


@pytest.mark.parametrize("losses", [[1.5], [1.5, 1.5], [1.5, 1.7]])
def test_one_point_lies_in_the_middle(losses):
    axes = rate_figure({"a": {0.01: losses}}).axes[0]
    low, high = axes.get_ylim()
    assert low < min(losses) and high > max(losses) and ticks(axes.xaxis) == ["0.01"]
    assert regret_figure({"a": {0.01: losses}}).axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize("losses", [{}, {"a": {0.1: [nan]}}, {"a": {0.1: []}}, {"a": {0.0: [1.0]}}])
def test_nothing_to_draw(losses):
    for draw in (rate_figure, regret_figure):
        with pytest.raises(ConfigError, match="wanted at least one finite number"):
            draw(losses)


# ---- regret


def test_the_distance_to_the_best_has_a_zero_and_is_logarithmic_above():
    figure = regret_figure(LOSSES)
    assert lines(figure) == {
        "r=4": close([(0.001, 0.5), (0.01, 0.2)]),
        "r=16": close([(0.001, 0.35), (0.01, 0.0), (0.1, 0.8)]),
    }
    assert ticks(figure.axes[0].yaxis) == ["0", "0.1", "0.2", "0.5"]
    low, one, two = (figure.axes[0].yaxis.get_transform().transform([value])[0] for value in (0.2, 0.4, 0.8))
    assert two - one == pytest.approx(one - low)


# ---- learnt and forgotten

POINTS = {"a": [(0.1, 2.0, "lr=0.1"), (0.4, 1.5, "lr=0.2")], "b": [(0.2, 2.1, "lr=0.1"), (0.5, nan, "lr=0.2")]}


def test_the_frontier_is_what_no_other_beats_in_both():
    assert frontier([(3, 1), (1, 3), (2, 2), (2, 2.5), (4, 1), (1, 4)]) == [(1, 3), (2, 2), (3, 1)]
    figure = frontier_figure(POINTS)
    (stairs,) = [line for line in figure.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    assert stairs.get_xydata().tolist() == [[0.1, 2.0], [0.4, 1.5]]
    assert lines(figure) == {"a": [(0.1, 2.0), (0.4, 1.5)], "b": [(0.2, 2.1)]}


def test_few_points_are_named_one_by_one_and_of_many_the_lowest_of_each_family():
    assert {"a, lr=0.1", "a, lr=0.2", "b, lr=0.1"} <= {text for text, _ in texts(frontier_figure(POINTS))}
    many = {name: [(at / 9, at % 5 + base, f"lr={at}") for at in range(7)] for name, base in (("a", 1), ("b", 3))}
    shown = {text for text, _ in texts(frontier_figure(many))}
    assert {"a", "b"} <= shown and not any("lr=" in text for text in shown)


def test_points_far_out_are_counted():
    far = {"a": [(at / 10, 2 - at / 10, "x") for at in range(5)] + [(70.0, 90.0, "x")]}
    assert "forgotten (nats per token); 1 far out is not drawn" in [text for text, _ in texts(frontier_figure(far))]
    assert len(lines(frontier_figure(far))["a"]) == 5
    with pytest.raises(ConfigError, match="learnt and forgotten: none of 1"):
        frontier_figure({"a": [(nan, 1.0, "x")]})


# ---- legibility


@pytest.mark.parametrize("width", [3.5, 7.2, 10.9])
@pytest.mark.parametrize("losses", [LOSSES, MANY, {"r=4": {0.01: [1.0, 1.1]}}], ids=["two", "twelve", "one"])
@pytest.mark.parametrize("draw", [rate_figure, regret_figure])
def test_texts_stay_apart_and_inside(draw, losses, width):
    found = texts(draw(losses, width=width))
    for (one, box), (other, another) in itertools.combinations(found, 2):
        across = min(box.x1, another.x1) - max(box.x0, another.x0)
        up = min(box.y1, another.y1) - max(box.y0, another.y0)
        assert across <= 1 or up <= 0.35 * box.height, (one, other)
    assert all(box.x0 >= -1 and box.x1 <= 100 * width + 1 for _, box in found)


def test_twelve_families_differ_in_colour_or_dash():
    drawn = [line for line in rate_figure(MANY).axes[0].get_lines() if line.get_label() in MANY]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 12


def test_long_names_have_a_legend_above():
    losses = {f"target_modules=q_proj+v_proj+o_proj r={r}": {0.1: [1.0 + r], 0.01: [1.2 + r]} for r in (2, 8)}
    figure = rate_figure(losses, width=3.5)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert all("…" in name for name in names) and len(set(names)) == 2


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.5, 0.6]),
        ([1.0, 0.98, 0.3], [1.0, 0.9, 0.3]),
        ([0.0] * 3, [0.0, 0.1, 0.2]),
        ([0.7] * 21, [at / 20 for at in range(21)]),
        ([0.4], [0.4]),
        ([], []),
    ],
)
def test_names_are_moved_apart_in_their_order(wanted, found):
    assert spread_out(wanted, 0.1) == pytest.approx(found)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw, given in ((rate_figure, LOSSES), (regret_figure, LOSSES), (frontier_figure, POINTS)):
        with pytest.raises(MissingPackageError, match="pip install"):
            draw(given)
