"""The figure of a claim holds the right numbers, names its curves where they end, and stays legible."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from minilora.errors import ConfigError
from minilora.report.claim_figures import claim_figure
from minilora.report.svg import COLOURS, SERIES, svg_file

matplotlib = pytest.importorskip("matplotlib")

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
CURVES = {
    f"r={r}": [(x, 2 + r / 10 + at / 7, 1.9 + r / 10, 2.6 + r / 10) for at, x in enumerate(RATES)] for r in (1, 4)
}


def lines(figure):
    """The curves by name, as lists of (x, y)."""
    named = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in named}


def ends(figure):
    """The names beside the axes with the height of each, in inches."""
    figure.draw_without_rendering()
    return {text.get_text(): text.get_window_extent().y0 / figure.dpi for text in figure.axes[0].texts}


def ticks(figure, axis="x"):
    figure.draw_without_rendering()
    found = getattr(figure.axes[0], f"{axis}axis")
    low, high = sorted(found.get_view_interval())
    return [text for at, text in zip(found.get_majorticklocs(), labels(found), strict=True) if low <= at <= high]


def labels(axis):
    return axis.get_major_formatter().format_ticks(axis.get_majorticklocs())


def test_curves_bands_and_axes_are_those_that_were_given():
    figure = claim_figure("rate", "loss", CURVES, log_x=True)
    assert lines(figure) == {name: [point[:2] for point in points] for name, points in CURVES.items()}
    bands = [band.get_datalim(figure.axes[0].transData) for band in figure.axes[0].collections]
    assert [(band.y0, band.y1) for band in bands] == [pytest.approx((2.0, 2.7)), pytest.approx((2.3, 3.0))]
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "linear", "rate")
    assert ticks(figure) == ["0.0003", "0.001", "0.003", "0.01"] and axes.get_ylim()[1] >= 3.0
    assert axes.get_title(loc="left") == "loss" and not figure.legends


def test_each_curve_is_named_at_its_end_in_its_colour():
    figure = claim_figure(
        "rate", "loss", {"low": [(1, 1.0, 1, 1), (2, 1.0, 1, 1)], "high": [(1, 2.0, 2, 2), (2, 5.0, 5, 5)]}
    )
    found = ends(figure)
    assert found["high"] > found["low"] + 0.5
    assert [text.get_color() for text in figure.axes[0].texts] == list(SERIES[:2])
    for text, (_, (x, y)) in zip(figure.axes[0].texts, [lines(figure)["low"], lines(figure)["high"]], strict=True):
        at = figure.axes[0].transData.transform((x, y))
        box = text.get_window_extent()
        assert box.x0 > at[0] and abs((box.y0 + box.y1) / 2 - at[1]) < 3  # pixels
        assert box.x1 <= figure.bbox.x1
    assert not ends(claim_figure("rate", "loss", {"alone": CURVES["r=1"]}))


@pytest.mark.parametrize("count", [2, 7, 25])
def test_names_do_not_lie_on_each_other(count):
    curves = {f"variant {at}": [(1, 1 + at / 1000, 1, 1.1), (2, 1.5, 1.4, 1.6)] for at in range(count)}
    figure = claim_figure("rank", "loss", curves, log_y=True)
    found = sorted(ends(figure).values())
    assert len(found) == count and all(b - a > 0.125 for a, b in itertools.pairwise(found))  # 9 points
    assert found[0] > 0 and found[-1] < figure.get_figheight()


def test_what_cannot_be_drawn_is_a_gap():
    points = [(1, 1.0, 0.9, 1.1), (2, math.nan, 0, 1), (3, 0.0, -1, 1), (4, 1e300, 1, 2), (0, 3.0, 2, 4)]
    drawn = lines(claim_figure("x", "y", {"a": points, "gone": [(1, math.inf, 1, 2)]}, log_x=True, log_y=True))
    assert list(drawn) == ["a"] and [x for x, _ in drawn["a"]] == [1, 2, 3, 4]
    assert [math.isnan(y) for _, y in drawn["a"]] == [False, True, True, True]
    with pytest.raises(ConfigError, match="curves: none of 0 values can be drawn"):
        claim_figure("x", "y", {"a": [(1, math.nan, 1, 2)]})


def test_what_is_beyond_the_top_leaves_the_picture():
    points = [(1, 1.0, 0.9, 1.1), (2, 1.5, 1.4, 1.6), (3, 9.0, 8.0, 9.5)]
    axes = claim_figure("x", "y", {"a": points, "b": [(1, 1.2, 1.1, 1.3), (3, 1.4, 1.3, 1.5)]}, top=2.0).axes[0]
    assert axes.get_ylim()[1] == 2.0 and all(line.get_clip_on() for line in axes.get_lines() if line.get_label() == "a")
    assert all(text.get_position()[1] <= 1.1 for text in axes.texts)  # the names stay beside the axes
    for top in (0.5, 100.0):  # nothing would be left, nothing is to be cut
        assert claim_figure("x", "y", {"a": points}, top=top).axes[0].get_ylim()[1] >= 9.0


def test_a_band_of_one_point_is_a_line():
    figure = claim_figure("x", "y", {"a": [(1, 1.0, 0.5, 1.75)], "b": [(2, 1.0, 1.0, 1.0)]})
    upright = [line.get_ydata().tolist() for line in figure.axes[0].get_lines() if line.get_label() == "_end"]
    assert [list(map(float, ys)) for ys in upright] == [[0.5, 1.75]]


def test_a_short_logarithmic_axis_has_round_numbers():
    figure = claim_figure("x", "y", {"a": [(1, 1.02, 1.0, 1.05), (2, 1.3, 1.2, 1.4)]}, log_y=True)
    assert len(ticks(figure, "y")) >= 3 and figure.axes[0].get_ylim()[1] < 2
    assert figure.axes[0].get_title(loc="left") == "y, log scale"


def test_a_file_has_the_colours_of_its_page():
    def file(dark):
        return svg_file(claim_figure("rate", "loss", CURVES, log_x=True), "a & b", dark)

    for dark in (False, True):
        text = file(dark)
        root = ElementTree.fromstring(text)
        assert root.attrib["aria-label"] == "a & b" and float(root.attrib["width"]) > float(root.attrib["height"]) > 200
        assert COLOURS["c0"][dark] in text and COLOURS["c0"][not dark] not in text and "var(" not in text
        assert re.search("r=4, 0.0003: 2.4", text)  # what a reader sees who points at it
        assert text == file(dark)
