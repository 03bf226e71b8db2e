"""A figure in a page: text as text, every colour a variable of the page, nothing to load, the same bytes every time."""

import re
from xml.etree import ElementTree

import pytest

from minilora.report.canvas import canvas
from minilora.report.figures import bar_figure, curve_figure, layer_figure, loss_figure, memory_figure, spectrum_figure
from minilora.report.svg import COLOURS, LARGEST, SERIES, SMALLEST, hover, inline_svg
from minilora.report.tables import Row

matplotlib = pytest.importorskip("matplotlib")

WORDS = "what the picture shows"
STEPS = [{"step": i, "loss": 2 - i / 40, "lr": 1e-4 * i} for i in range(40)]
EVALS = [{"step": i, "eval_loss": 1.75 - i / 100} for i in (10, 20, 30)]
RATIOS = {f"model.layers.{i}.{kind}": 0.01 * (i + 1) for i in range(12) for kind in ("q_proj", "<v> & 'o'")}
FIGURES = {
    "loss": lambda: loss_figure(STEPS + EVALS),
    "curve": lambda: curve_figure(STEPS, "lr"),
    "spectrum": lambda: spectrum_figure({f"_{i} $a$": [1.0, 0.1 / (i + 1)] for i in range(8)}),
    "layers": lambda: layer_figure(RATIOS | {"model.layers.3.k": 99.0, "lm_head": float("nan")}),
    "memory": lambda: memory_figure([{"name": "weights", "bytes": 10}, {"name": "embeddings " * 5, "bytes": 5}]),
    "bars": lambda: bar_figure(["one", "two"], [Row("a", ["1", "2"], [1.0, 2.0]), Row("b", ["3"], [3.0], "other")]),
}


@pytest.fixture(scope="module", params=FIGURES)
def drawn(request):
    """A figure and its SVG, drawn once for all tests of this file."""
    figure = FIGURES[request.param]()
    return request.param, figure, inline_svg(figure, WORDS)


def elements(svg, kind):
    return list(ElementTree.fromstring(svg).iter(kind))


def styles(svg):
    return [dict(part.split(":", 1) for part in style.split(";")) for style in re.findall(r'style="([^"]*)"', svg)]


def test_text_is_text_in_the_font_of_the_page(drawn):
    _, figure, svg = drawn
    shown = {line for text in figure.findobj(matplotlib.text.Text) if text.get_visible()
             for line in text.get_text().split("\n") if line}  # fmt: skip
    texts = [element.text for element in elements(svg, "text")]
    assert set(texts) <= shown and len(texts) >= 4
    assert "font-family" not in svg and {style["font-size"] for style in styles(svg) if "font-size" in style} == {"9px"}


def test_every_colour_is_a_variable_or_none(drawn):
    _, _, svg = drawn
    found = {style[key] for style in styles(svg) for key in ("fill", "stroke") if key in style}
    assert found <= {f"var(--{name})" for name in COLOURS} | {"none"} and len(found) >= 2
    assert not re.search(r"#[0-9a-f]{3,8}\b|rgba?\(|hsla?\(", svg)
    attributes = {name for element in ElementTree.fromstring(svg).iter() for name in element.attrib}
    assert attributes <= {"viewBox", "role", "aria-label", "style", "d", "transform", "x", "y", "cx", "cy", "r"}
    groups = list(ElementTree.fromstring(svg))
    assert {group.tag for group in groups} == {"g"}
    assert all("fill:" in group.get("style") for group in groups)  # what says nothing of its fill would be black


def test_nothing_has_an_id_a_link_or_something_to_load(drawn):
    _, _, svg = drawn
    assert {element.tag for element in ElementTree.fromstring(svg).iter()} <= {
        "svg",
        "g",
        "path",
        "circle",
        "text",
        "title",
    }
    assert not re.search(r"\bid=|href|url\(|<style|xmlns|http", svg)


def test_the_same_figure_gives_the_same_bytes(drawn):
    name, _, svg = drawn
    assert inline_svg(FIGURES[name](), WORDS) == svg


def test_drawing_leaves_a_figure_as_it_was(drawn):
    _, figure, svg = drawn
    assert figure.get_layout_engine() is not None  # it is laid out again when its size or its labels change
    assert {artist.get_gid() for artist in figure.findobj()} == {None}
    assert inline_svg(figure, WORDS).count("<path") == svg.count("<path")


def test_everything_lies_inside_the_picture(drawn):
    _, _, svg = drawn
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    for path in root.iter("path"):
        at = re.findall(r"-?[\d.]+", path.get("transform", "0 0"))
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d"))]
        xs, ys = numbers[::2], numbers[1::2]
        assert min(xs) + float(at[0]) >= -1 and max(xs) + float(at[0]) <= width + 1
        assert min(ys) + float(at[1]) >= -1 and max(ys) + float(at[1]) <= height + 1
    for circle in root.iter("circle"):
        assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height
    for look, text in ((group.get("style"), text) for group in root for text in group.iter("text")):
        across, up = map(float, re.findall(r"-?[\d.]+", text.get("transform", f"{text.get('x')} {text.get('y')}"))[:2])
        room = 0.5 * 9 * len(text.text)  # the page's font is not known here; half an em a character
        anchor = re.search(r"text-anchor:(\w+)", look)
        left = {"start": 0, "middle": 0.5, "end": 1}[anchor[1] if anchor else "start"] * room
        assert across - left >= -4 and across - left + room <= width + 4 and 0 < up < height


def test_it_is_described_and_scales_only_so_far_that_text_stays_legible(drawn):
    _, figure, svg = drawn
    root = ElementTree.fromstring(svg)
    px = 96 * figure.get_figwidth()
    assert (root.get("role"), root.get("aria-label")) == ("img", WORDS)
    look = dict(part.split(":") for part in root.get("style").split(";"))
    assert float(look["min-width"][:-2]) == pytest.approx(SMALLEST * px, abs=0.6)
    assert float(look["max-width"][:-2]) == pytest.approx(LARGEST * px, abs=0.6)
    assert SMALLEST * 9 * 96 / 72 >= 10  # px of the type, at the smallest


def titles(svg):
    return [title.text for title in elements(svg, "title")]


def test_evaluations_and_cells_say_their_value():
    assert titles(inline_svg(loss_figure(STEPS + EVALS), WORDS)) == [
        "evaluation, 10: 1.65",
        "evaluation, 20: 1.55",
        "evaluation, 30: 1.45",
    ]
    wanted = {**RATIOS, "lm_head": float("nan")}
    assert titles(inline_svg(layer_figure(wanted), WORDS)) == [f"{path}: {value:.4g}" for path, value in wanted.items()]


def test_the_dots_lie_on_the_curve_that_they_equal():
    steps = [{"step": i, "loss": 2.0 - i / 7} for i in range(4)]
    svg = inline_svg(loss_figure(steps + [{"step": i, "eval_loss": 2.0 - i / 7} for i in range(4)]), WORDS)
    dots = [f"{dot.get('cx')} {dot.get('cy')}" for dot in elements(svg, "circle")]
    assert len(dots) == 10 and dots[:4] == dots[4:8]  # the last two stand in the legend
    curve = next(element.get("d") for element in elements(svg, "path") if element.get("d").count("L") == 3)
    assert re.findall(r"[\d.]+", curve) == " ".join(dots[:4]).split()
    sizes = {float(dot.get("r")) for dot in elements(svg, "circle")}
    assert sizes == {3.25}


def test_ten_thousand_steps_stay_small_and_keep_their_spikes():
    steps = [{"step": i, "loss": 2 + (i * 7 % 97) / 97} for i in range(10_000)]
    steps[5_003]["loss"], steps[7_777]["loss"] = 50.0, -10.0
    svg = inline_svg(loss_figure(steps), WORDS)
    assert len(svg) < 150_000
    path = max((element.get("d") for element in elements(svg, "path")), key=len)
    heights = sorted(float(number) for number in re.findall(r"-?[\d.]+", path)[1::2])
    assert heights[1] - heights[0] > 100 and heights[-1] - heights[-2] > 10


def test_a_hostile_name_stays_text():
    evil = "<script>alert(1)</script> \x00 \ud800 \"'&amp; $x_1$ 字"
    svg = inline_svg(spectrum_figure({evil: [2.0, 1.0], f"{evil}.0.{evil}": [3.0, 1.0]}), evil)
    shown = [element.text for element in elements(svg, "text")]
    assert "<script>alert(1)</script> \ufffd \ufffd \"'&amp; $x_1$ 字" in shown
    assert ElementTree.fromstring(svg).get("aria-label").startswith("<script>") and "<script" not in svg
    assert "<script>" in titles(svg)[0]


def test_hover_texts_must_fit_what_is_drawn():
    with canvas(3, 2) as (figure, axes):
        hover(axes.plot([1, 2], [1, 2], "o", color=SERIES[0])[0], ["only one"])
    with pytest.raises(ValueError, match="zip"):
        inline_svg(figure, WORDS)


def test_the_two_colours_of_a_variable_differ_and_no_two_are_alike():
    for shade in (0, 1):
        assert len({pair[shade] for pair in COLOURS.values()}) == len(COLOURS)
    assert all(light != dark for light, dark in COLOURS.values())
    assert len(SERIES) == 6
