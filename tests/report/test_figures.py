"""The figures hold the right numbers, are objects of their own, and stay legible whatever they are given."""

import ast
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, inject
from minilora.errors import ConfigError, MissingPackageError, StateError
from minilora.report.figures import (
    bar_figure,
    compare_figure,
    curve_figure,
    layer_figure,
    loss_figure,
    memory_figure,
    runs_figure,
    smoothed,
    spectrum_figure,
)
from minilora.report.heatmap import beyond_scale, grid_of, scale_of
from minilora.report.inspect import memory_table, spectra, spectrum, update_ratios
from minilora.report.svg import SERIES
from minilora.report.tables import Row

matplotlib = pytest.importorskip("matplotlib")

PATHS = [f"model.layers.{index}.attn.{kind}" for index in range(3) for kind in ("q_proj", "v_proj")]


def step(number, loss, **more):
    return {"step": number, "loss": loss, "lr": 2e-4, "grad_norm": 0.5, **more}


def lines(figure):
    """The curves by name, as lists of (x, y)."""
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in figure.axes[0].get_lines()}


def marked(figure):
    """The curves by name, as the indices of the points that are drawn as points."""
    return {line.get_label(): line.get_markevery() for line in figure.axes[0].get_lines() if line.get_marker() == "o"}


def ticks(axis):
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    places = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    return axis.get_major_formatter().format_ticks(places)


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]


def adapted(randomize):
    """Two layers that are not square, of which the second moves more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    inject(model, LoraConfig(r=3, lora_alpha=12, target_modules=["0", "2"]))
    randomize(model)
    with torch.no_grad():
        model[2].lora_B.mul_(5)
    return model


# ---- curves of a run


def test_losses_and_evaluations_are_those_of_the_log():
    records = [step(i, 4 - i / 10) for i in range(1, 6)] + [{"step": 5, "eval_loss": 3.25, "prompt": "?"}]
    assert lines(loss_figure(records)) == {
        "training, each step": [(float(i), 4 - i / 10) for i in range(1, 6)],
        "evaluation": [(5.0, 3.25)],
    }


def test_other_records_of_a_log_are_passed_over():
    records = [step(1, 2.0), {"step": 2, "skipped": "no finite loss"}, step(3, None), step(4, 1.0)]
    assert lines(loss_figure(records)) == {"training, each step": [(1.0, 2.0), (4.0, 1.0)]}


def test_many_steps_have_their_centred_mean_beside_them():
    records = [step(i, float(i % 2)) for i in range(30)]
    drawn = lines(loss_figure(records))
    assert list(drawn) == ["training, each step", "mean of 5 steps"]
    assert drawn["mean of 5 steps"][0] == (0.0, 0.0) and drawn["mean of 5 steps"][10] == (10.0, pytest.approx(0.4))
    line, mean = loss_figure(records).axes[0].get_lines()
    assert line.get_alpha() < 1 and line.get_linewidth() < mean.get_linewidth()
    assert line.get_color() == mean.get_color() == SERIES[0]


def test_a_mean_keeps_gaps_and_the_ends():
    points = [(float(i), value) for i, value in enumerate([1.0, 2.0, math.nan, 4.0, 8.0])]
    assert [value for _, value in smoothed(points, 5)][:2] == [1.0, 1.5]
    assert math.isnan(smoothed(points, 5)[2][1]) and smoothed(points, 5)[3:] == [(3.0, 6.0), (4.0, 8.0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_value_that_is_not_finite_is_a_gap(bad):
    drawn = lines(loss_figure([step(i, bad if i == 2 else 1.0) for i in range(5)]))["training, each step"]
    assert [math.isnan(y) for _, y in drawn] == [False, False, True, False, False]


def test_a_value_alone_between_gaps_is_a_point():
    losses = [1.0 + i / 60 for i in range(60)]
    losses[0] = losses[29] = losses[31] = math.nan
    losses[59], losses[58] = 1.0, math.nan
    assert marked(loss_figure([step(i, x) for i, x in enumerate(losses)]))["training, each step"] == [30, 59]


def test_a_short_run_and_every_evaluation_are_points():
    records = [step(i, 2.0 - i / 10) for i in range(4)]
    assert marked(loss_figure(records)) == {"training, each step": [0, 1, 2, 3]}
    long = [step(i, 2.0 - i / 100) for i in range(40)] + [{"step": i, "eval_loss": 1.5} for i in range(0, 40, 3)]
    assert marked(loss_figure(long)) == {"evaluation": list(range(14))}
    assert loss_figure(long).axes[0].get_lines()[-1].get_linestyle() == "None"


def test_one_measure_by_step_with_its_label():
    records = [step(i, 1.0, grad_norm=None if i % 2 else float(i)) for i in range(6)]
    figure = curve_figure(records, "grad_norm")
    assert lines(figure) == {"Gradient norm": [(0.0, 0.0), (2.0, 2.0), (4.0, 4.0)]}
    assert {"optimizer step", "L2 norm, all trained parameters"} <= set(texts(figure))
    assert list(lines(curve_figure([{"step": 1, "accuracy": 0.5}], "accuracy"))) == ["accuracy"]


def test_runs_side_by_side_are_a_line_and_points():
    figure = compare_figure({"ours": [3.0, 2.0, math.nan], "theirs": [3.0, 2.5, 2.0]})
    first, second = figure.axes[0].get_lines()
    assert first.get_xydata()[:2].tolist() == [[1, 3], [2, 2]] and math.isnan(first.get_ydata()[2])
    assert second.get_xydata().tolist() == [[1, 3], [2, 2.5], [3, 2]]
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "None")
    assert {"ours", "theirs"} <= set(texts(figure))


def test_runs_have_a_colour_each_lines_for_training_and_points_for_what_is_held_out():
    one = [step(1, 3.0), step(2, 2.0), {"step": 2, "eval_loss": 2.5}]
    figure = runs_figure({"one": one, "two": [step(1, 4.0), step(3, 1.0)]})
    assert lines(figure) == {"one": [(1, 3), (2, 2)], "one, held out": [(2, 2.5)], "two": [(1, 4), (3, 1)]}
    first, held, second = figure.axes[0].get_lines()
    assert first.get_color() == held.get_color() == SERIES[0] != second.get_color()
    assert (first.get_linestyle(), held.get_linestyle()) == ("-", "None")
    long = [step(i, 2.0 + (-1) ** i) for i in range(1, 101)]
    assert max(value for _, value in lines(runs_figure({"long": long}))["long"][5:-5]) < 2.5


# ---- axes


def test_axes_end_with_the_steps_and_have_round_numbers():
    axes = loss_figure([step(i, 4 - i / 20) for i in range(1, 41)]).axes[0]
    assert axes.get_xlim() == (1, 40) and axes.get_ylim() == (2, 4)
    assert ticks(axes.yaxis) == ["2", "2.5", "3", "3.5", "4"]
    assert all(tick.isdigit() for tick in ticks(axes.xaxis)) and "40" in ticks(axes.xaxis)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 2e-4], ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        ([-1.0, 1.0], ["-1", "-0.5", "0", "0.5", "1"]),
        ([0.1, 0.4], ["0.1", "0.2", "0.3", "0.4"]),
        ([1402.1, 1402.4], ["1,402.1", "1,402.2", "1,402.3", "1,402.4"]),
        ([0.0, 2e6], ["0", "500,000", "1,000,000", "1,500,000", "2,000,000"]),
    ],
)
def test_ticks_are_as_long_as_they_must_be(values, wanted):
    figure = curve_figure([step(i, 1.0, lr=value) for i, value in enumerate(values)], "lr")
    assert ticks(figure.axes[0].yaxis) == wanted


@pytest.mark.parametrize("value", [0.0, 1e-40, 3.0, -3.0, 1e38])
def test_a_constant_lies_flat_in_the_middle(value):
    axes = loss_figure([step(i, value) for i in range(5)]).axes[0]
    low, high = axes.get_ylim()
    assert low < high and low <= value <= high
    assert value == 0 or value == pytest.approx((low + high) / 2)


def test_one_step_lies_inside_the_axes():
    axes = loss_figure([step(7, 2.5)]).axes[0]
    assert axes.get_xlim() == (6.5, 7.5) and axes.get_ylim() == (0, 5)


@pytest.mark.parametrize("width", [3.5, 7.2])
def test_a_legend_does_not_take_the_room_of_the_curves(width):
    few, many = ({f"model.decoder.layers.{i}.q_proj": [3.0, 1.0, 0.3] for i in range(count)} for count in (2, 12))
    for paths in (few, many):
        figure = spectrum_figure(paths, width=width)
        figure.draw_without_rendering()
        assert figure.axes[0].get_window_extent().height > 0.5 * 72 * min(2.2, width)


# ---- what an adapter learnt


def test_the_spectrum_of_a_model_is_that_of_its_adapters(randomize):
    model = adapted(randomize)
    figure = spectrum_figure(model)
    assert list(lines(figure)) == ["2", "0"]  # the one that moved most comes first
    for path, points in lines(figure).items():
        assert [x for x, _ in points] == [1, 2, 3]
        assert [y for _, y in points] == pytest.approx(spectrum(model[int(path)]).tolist())
    assert figure.axes[0].get_yscale() == "log"
    assert lines(spectrum_figure(spectra(model, most=1))).keys() == {"2"}


def test_spectra_are_those_of_the_layers_that_moved_most(randomize):
    model = adapted(randomize)
    assert list(spectra(model)) == ["2", "0"]
    assert list(spectra(model, ratios={"0": 2.0, "2": 1.0}, most=1)) == ["0"]
    assert spectra(model)["0"] == spectrum(model[0]).tolist()


def test_a_log_axis_has_no_zero_and_gives_each_decade_the_same_room():
    figure = spectrum_figure({"a": [1.0, 0.1, 0.001, 0.0, -1.0]})
    assert [math.isnan(y) for _, y in lines(figure)["a"]] == [False, False, False, True, True]
    assert ticks(figure.axes[0].yaxis) == ["0.001", "0.01", "0.1", "1"]
    assert ticks(spectrum_figure({"a": [4.0, 1.5]}).axes[0].yaxis) == ["1", "2", "5", "10"]


def test_the_seventh_line_is_dashed():
    styles = [(line.get_color(), line.get_linestyle()) for line in
              spectrum_figure({str(i): [2.0, 1.0] for i in range(9)}).axes[0].get_lines()]  # fmt: skip
    assert len(set(styles)) == 9 and styles[6] == (SERIES[0], "--")


def cells(figure):
    (found,) = figure.axes[0].collections
    return found


def test_the_heat_map_has_a_cell_for_each_layer(randomize):
    ratios = {path: 0.01 * number for number, path in enumerate(PATHS, 1)} | {"lm_head": math.nan}
    figure = layer_figure(ratios)
    assert cells(figure).get_array().compressed().tolist() == pytest.approx(list(ratios.values())[:-1])
    assert cells(figure).get_array().mask.tolist() == [False] * 6 + [True]
    corners = [tuple(path.vertices.min(axis=0).round().astype(int)) for path in cells(figure).get_paths()]
    assert corners == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 2)]
    assert ticks(figure.axes[0].yaxis) == ["q_proj", "v_proj", "lm_head"]
    assert ticks(figure.axes[0].xaxis) == ["0", "1", "2", "none"]
    assert cells(figure).get_clim() == (0, pytest.approx(0.06))


def test_the_heat_map_of_a_model_shows_its_ratios(randomize):
    model = adapted(randomize)
    assert cells(layer_figure(model)).get_array().tolist() == pytest.approx(list(update_ratios(model).values()))
    with pytest.raises(StateError, match="other"):
        layer_figure(model, "other")


def colours(figure):
    figure.draw_without_rendering()
    return [matplotlib.colors.to_hex(colour, keep_alpha=True) for colour in cells(figure).get_facecolor()]


def test_one_outlier_does_not_make_the_others_pale():
    ratios = {f"layers.{i}.q": 0.02 + 0.001 * i for i in range(8)}
    before = colours(layer_figure(ratios))
    after = colours(layer_figure(ratios | {"layers.8.q": 5.0, "layers.9.q": math.inf}))
    assert after[:8] == before and len(set(before)) > 2
    assert after[8] == SERIES[1] + "ff" and after[9].endswith("00")
    label = "‖ΔW‖ / ‖W‖, orange: beyond the scale"
    assert label in texts(layer_figure(ratios | {"layers.8.q": 5.0})) and label not in texts(layer_figure(ratios))
    assert (
        beyond_scale([*ratios.items(), ("layers.8.q", 5.0)]) == ["layers.8.q"] and beyond_scale([*ratios.items()]) == []
    )
    assert beyond_scale([("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 99.0)]) == []  # bars have no scale of colours


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([1.0], 1.0),
        ([1.0, 3.0], 3.0),
        ([1.0, 100.0], 1.0),
        ([1.0, 2.0, 3.0, 100.0], 3.0),
        ([1.0, 1.0, 1.0, 3.9], 3.9),
        ([float(i) for i in range(1, 30)], 29.0),
        ([0.0] * 20 + [0.1, 0.2], 0.2),  # most layers did not move: what moved is no outlier
        ([0.0, 0.0], 1.0),
        ([2.0 + 0.01 * i for i in range(20)] + [5.8, 7.5], 2.19),  # three times the rest would make it pale
        ([1.0 + 0.001 * i for i in range(20)] + [1.4], 1.4),  # all are alike, and so is this one
        ([2.0, math.nan, math.inf], 2.0),
    ],
)
def test_the_scale_ends_with_the_largest_that_is_no_outlier(values, top):
    assert scale_of(values) == top


def test_layers_that_would_share_a_cell_get_rows_of_their_own():
    paths = [f"{side}.{index}.mlp.{expert}.up" for side in ("enc", "dec") for index in (0, 1) for expert in range(3)]
    places, rows, columns = grid_of(paths)
    assert len(set(places)) == len(paths) and "enc.*.mlp.2.up" in rows and columns == [0, 1]
    long = [f"{side}.{index}.mlp.experts.{index}.gate_proj" for side in "ab" for index in (0, 1)]
    _, names, _ = grid_of(long)
    assert len(set(names)) == 4 and all("…" in name for name in names)


@pytest.mark.parametrize(("count", "width"), [(2, 3.5), (30, 3.5), (80, 3.5), (80, 10.9), (200, 10.9)])
def test_cells_of_a_heat_map_can_be_seen(count, width):
    figure = layer_figure({f"layers.{i}.q_proj": 1.0 + i % 7 for i in range(count)}, width=width)
    figure.draw_without_rendering()
    cell = figure.axes[0].transData.transform([(1, 0), (0, 0)])
    assert 0.06 * 72 < cell[0][0] - cell[1][0] < 0.5 * 100
    names = [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(names))


def test_layers_without_an_index_are_bars():
    figure = layer_figure({"encoder.proj": 0.04, "w2v.head": 0.01})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.04, 0.01]
    assert {"encoder.proj", "w2v.head", "0.04", "0.01"} <= set(texts(figure))


# ---- bars


def test_memory_is_drawn_in_bytes(randomize):
    figure = memory_figure([{"name": "weights", "bytes": 1_234_567_890, "note": "x"}, {"name": "rest", "bytes": 0}])
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1_234_567_890, 0]
    assert {"weights", "rest", "1.23 GB", "0 B"} <= set(texts(figure))
    model = adapted(randomize)
    drawn = [bar.get_width() for bar in memory_figure(model).axes[0].patches]
    assert drawn == [row["bytes"] for row in memory_table(model)] and min(drawn) > 0


def test_bars_of_several_groups_are_shares_of_the_largest_of_their_own():
    rows = [
        Row("time", ["2 s", "4 s"], [2.0, 4.0], "time"),
        Row("loss", ["1", "1"]),
        Row("memory", ["", "3 MB"], [None, 3.0], "memory"),
    ]
    figure = bar_figure(["one", "two"], rows)
    one, two = figure.axes[0].containers
    assert [bar.get_width() for bar in one] == [0.5] and [bar.get_width() for bar in two] == [1.0, 1.0]
    assert (
        one[0].get_y() < two[0].get_y() < 0.5 < two[1].get_y()
    )  # under each other, and the row without values left out
    assert (one.get_label(), two.get_label()) == ("one", "two")
    assert {"2 s", "4 s", "3 MB", "time", "memory"} <= set(texts(figure)) and "loss" not in texts(figure)
    alike = [Row(row.name, row.texts, row.values, "MB") for row in rows]
    assert [bar.get_width() for bar in bar_figure(["one", "two"], alike).axes[0].patches] == [2.0, 4.0, 3.0]


def test_a_long_name_is_wrapped_and_whole():
    name = "embeddings (and a head tied to them)"
    figure = bar_figure([""], [Row(name, ["1"], [1.0]), Row("x", ["nan"], [math.nan])], width=3.5)
    figure.draw_without_rendering()
    label = figure.axes[0].get_yticklabels()[0]
    assert label.get_text().replace("\n", " ") == name and "\n" in label.get_text()
    assert label.get_window_extent().x0 >= 0
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 0.0]


# ---- every figure


FIGURES = {
    "loss": lambda: loss_figure([step(i, 2 - i / 20) for i in range(30)] + [{"step": 9, "eval_loss": 1.5}]),
    "curve": lambda: curve_figure([step(i, 1.0) for i in range(20)], "lr"),
    "compare": lambda: compare_figure({"a": [2.0, 1.0], "_b $x$": [2.0, 1.5]}),
    "runs": lambda: runs_figure({"a": [step(1, 2.0), step(2, 1.0)], "_b $x$": [{"step": 1, "eval_loss": 1.5}]}),
    "spectrum": lambda: spectrum_figure({"_orig_mod.a_b": [1.0, 0.1, 0.01], "$c_d$": [2.0, 0.3]}),
    "layers": lambda: layer_figure({path: 0.01 * i for i, path in enumerate(PATHS)} | {"lm_head": math.nan}),
    "memory": lambda: memory_figure([{"name": "weights", "bytes": 10}, {"name": "$rest$", "bytes": 5}]),
    "bars": lambda: bar_figure(["one", "two"], [Row("a", ["1", "2"], [1.0, 2.0])]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_an_object_of_its_own(name, tmp_path):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    assert type(figure) is matplotlib.figure.Figure
    figure.axes[0].set_title("mine")
    figure.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("style", ["dark_background", "ggplot"])
def test_the_style_of_the_process_changes_nothing_that_is_drawn(name, style):
    def look(figure):
        figure.draw_without_rendering()
        parts = figure.findobj(matplotlib.text.Text) + figure.findobj(matplotlib.lines.Line2D)
        return [(type(part), part.get_color(), part.get_visible()) for part in parts], figure.axes[0].get_ylim()

    import matplotlib.style

    plain = look(FIGURES[name]())
    with matplotlib.style.context(style):
        figure = FIGURES[name]()
    assert look(figure) == plain


REFUSED = {
    "loss": lambda: loss_figure([step(i, math.nan) for i in range(3)]),
    "loss of no records": lambda: loss_figure([]),
    "curve": lambda: curve_figure([step(1, 1.0)], "accuracy"),
    "compare": lambda: compare_figure({"a": [], "b": [math.inf]}),
    "runs": lambda: runs_figure({"a": [], "b": [step(1, math.nan)]}),
    "spectrum": lambda: spectrum_figure({"a": [0.0, math.nan]}),
    "layers": lambda: layer_figure({"a.0.b": math.nan}),
    "memory": lambda: memory_figure([]),
    "bars": lambda: bar_figure(["a"], [Row("x", ["1"])]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_an_empty_picture_is_refused_in_a_line(name):
    with pytest.raises(ConfigError, match=r"none of \d values can be drawn; wanted at least one finite number$"):
        REFUSED[name]()


@pytest.mark.parametrize("name", FIGURES)
def test_without_matplotlib_the_way_out_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r'pip install "minilora\[plot\]"'):
        FIGURES[name]()


SOURCES = sorted(Path(minilora.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_matplotlib_is_imported_inside_functions_and_pyplot_never(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    at_once = [node for node in whole if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in at_once if "matplotlib" in ast.unparse(node)]
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and "pyplot" in ast.unparse(node)
    ]
