"""The figures of the measures hold the right numbers and stay legible, whatever they are given."""

import csv
import io
import itertools
import math

import pytest

from minilora.errors import ConfigError
from minilora.report.lab_figures import landscape_figure, norms_figure, similarity_figure, spectra_figure
from minilora.report.svg import SERIES, inline_svg

matplotlib = pytest.importorskip("matplotlib")

COLUMNS = ("step", "layer", "update_norm", "relative", "grad_norm")
ROWS = [
    dict(zip(COLUMNS, (step, f"layers.{at}.{kind}", 1.0 + at + step, 0.1, None if step == 1 else 0.5), strict=True))
    for step in (1, 2, 3)
    for at in range(3)
    for kind in ("q_proj", "v_proj")
]


def lines(figure):
    """The lines that a legend would name, as lists of (x, y)."""
    named = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in named}


def legend(figure):
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def ticks(figure):
    figure.draw_without_rendering()
    return [label.get_text() for label in figure.axes[0].get_xticklabels() if label.get_text()]


def test_layers_of_a_kind_are_pale_lines_and_their_median():
    spectra = {f"layers.{at}.q_proj": [4.0 + at, 2.0, 0.0] for at in range(3)} | {"head": [1.0]}
    figure = spectra_figure(spectra)
    assert lines(figure)["q_proj (median of 3)"][:2] == [(1, 5.0), (2, 2.0)]
    assert math.isnan(lines(figure)["q_proj (median of 3)"][2][1]) and lines(figure)["head"] == [(1, 1.0)]
    assert legend(figure) == ["q_proj (median of 3)", "head"]
    pale = [line for line in figure.axes[0].get_lines() if line.get_alpha()]
    assert len(pale) == 3 and {line.get_color() for line in pale} == {SERIES[0]}
    assert figure.axes[0].get_yscale() == "log"


def test_norms_by_step_are_those_of_the_rows_also_from_a_file():
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(ROWS)
    file.seek(0)
    for rows in (ROWS, list(csv.DictReader(file))):
        found = lines(norms_figure(rows))
        assert found == {f"{kind} (median of 3)": [(1, 3.0), (2, 4.0), (3, 5.0)] for kind in ("q_proj", "v_proj")}
        assert lines(norms_figure(rows, "grad_norm"))["q_proj (median of 3)"] == [(2, 0.5), (3, 0.5)]
    assert norms_figure(ROWS, "grad_norm").axes[0].get_title(loc="left").startswith("L2 norm")


def test_a_landscape_says_where_base_and_adapted_are():
    points = [(1.0, 2.0), (-0.5, 4.0), (0.0, 3.0), (2.0, math.nan)]
    figure = landscape_figure(points)
    assert figure.axes[0].get_lines()[0].get_xydata()[:3].tolist() == [list(point) for point in sorted(points)[:3]]
    assert {"0\nbase", "1\nadapted", "0.5"} <= set(ticks(figure)) and not legend(figure)
    two = landscape_figure({"rank 8": points, "rank 16": [(0, 3.0), (1, 1.5)]})
    assert legend(two) == ["rank 8", "rank 16"] and lines(two)["rank 16"] == [(0, 3.0), (1, 1.5)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (8, 64), (64, 8), (200, 200)])
def test_similarities_lie_where_they_belong(shape):
    rows, columns = shape
    grid = [[(i * columns + j) / (rows * columns) for j in range(columns)] for i in range(rows)]
    figure = similarity_figure(grid, ("one", "two"))
    axes = figure.axes[0]
    assert axes.collections[0].get_array().tolist() == grid and axes.collections[0].get_clim() == (0, 1)
    assert axes.get_ylim() == (rows, 0) and axes.get_xlim() == (0, columns)  # i goes down, as in the paper
    figure.draw_without_rendering()
    assert figure.get_figheight() < 1.5 * figure.get_figwidth() + 1
    for axis, upright in ((axes.xaxis, False), (axes.yaxis, True)):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        edges = sorted((box.y0, box.y1) if upright else (box.x0, box.x1) for box in boxes)
        assert edges and all(end < start for (_, end), (start, _) in itertools.pairwise(edges))


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: spectra_figure({"a": [0.0, math.nan]}), "singular values"),
        (lambda: norms_figure(ROWS, "loss"), "column='loss'"),
        (lambda: norms_figure(ROWS[:6], "grad_norm"), "grad_norm"),
        (lambda: landscape_figure([(0, math.nan)]), "loss"),
        (lambda: similarity_figure([]), "two dimensions"),
        (lambda: similarity_figure([[0.5, math.nan]]), "in \\[0, 1\\]"),
        (lambda: similarity_figure([[0.5], [0.1, 0.2]]), "two dimensions"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, said):
    with pytest.raises(ConfigError, match=said):
        draw()


@pytest.mark.parametrize(
    "figure",
    [
        lambda: spectra_figure({"a.0.q": [1.0, 0.5], "a.1.q": [2.0, 0.1]}),
        lambda: norms_figure(ROWS),
        lambda: landscape_figure([(0, 3.0), (1, 2.0)]),
        lambda: similarity_figure([[0.5, 1.0]]),
    ],
)
def test_a_page_can_show_them(figure):
    assert "<path" in inline_svg(figure(), "words") and "#0072b2" not in inline_svg(figure(), "words")
