"""The report page: whole, safe, self-contained, and right about its numbers, whatever a run recorded."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from minilora.report.page import render
from minilora.report.pictures import MOST_POINTS

VOID = {"meta", "br", "hr", "img", "link", "input"}
PATHS = [f"model.layers.{index}.attn.{kind}" for index in range(3) for kind in ("q_proj", "v_proj")]


class Strict(HTMLParser):
    """Every tag that opens closes, in order; keeps the tags, the texts and the attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(page):
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def svgs(page):
    """Every picture of the page, parsed as XML by the strict parser, and described in words."""
    pictures = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    for picture in pictures:
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label")) > 20
    return pictures


def picture_of(page, words):
    (found,) = [picture for picture in svgs(page) if picture.get("aria-label").startswith(words)]
    return found


def curve(picture, css="c0"):
    """The path drawn with exactly these classes, as its list of (pen, x, y)."""
    (path,) = [path for path in picture.iter("path") if path.get("class") == css]
    return [(pen, float(x), float(y)) for pen, x, y in re.findall(r"([ML])(-?[\d.]+) (-?[\d.]+)", path.get("d"))]


def labels(picture):
    return [text.text for text in picture.iter("text")]


def bars(page):
    return re.findall(r'class="bar" style="width:([\d.]+)%"', page)


def step(number, loss, **more):
    measures = {"lr": 2e-4, "tokens_per_s": 1800.0, "rss_mb": 1400.0, "grad_norm": 0.5, "seconds": 0.3}
    return {"step": number, "loss": loss, **measures, **more}


def full_run(**changes):
    run = {
        "title": "a run",
        "subtitle": "of minilora",
        "headline": [{"label": "loss", "value": "3.91 → 1.12"}],
        "steps": [step(i, 4 - i / 20, lr=2e-4 * i / 40) for i in range(1, 41)],
        "evals": [{"step": i, "loss": 4 - i / 20, "prompt": "Who?", "answer": f"answer {i}"} for i in (1, 20, 40)],
        "answers": [{"prompt": "Where?", "before": "Here.", "after": "There."}],
        "memory": [
            {"name": "weights", "bytes": 1_234_567_890, "note": "nf4"},
            {"name": "rest", "bytes": 0, "note": ""},
        ],
        "parameters": [{"name": "all", "total": 137_022_720, "trainable": 2_400_000, "bits": 4.127}],
        "layers": [{"path": path, "ratio": 0.01 * number} for number, path in enumerate(PATHS, 1)],
        "spectrum": [{"path": PATHS[0], "values": [1.0, 0.1, 0.001]}],
        "settings": {"r": 16},
        "versions": {"torch": "2.9.0"},
    }
    return run | changes


def test_full_page_parses_and_holds_every_section():
    page = render(full_run())
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Training",
        "How the answer changed while training",
        "Before and after",
        "Memory",
        "Parameters",
        "How far each layer moved",
        "Spectrum of the updates",
        "Settings and versions",
    ]
    parse(page)
    assert len(svgs(page)) == 7  # loss, four small curves, heat map, spectrum


def test_page_needs_nothing_else():
    page = render(full_run())
    parser = parse(page)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(parser.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in parser.attributes}
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page


EVIL = "<script>alert('x')</script> & \"quoted\" \x00 \ud800 <svg onload=1>"


@pytest.mark.parametrize(
    "changes",
    [
        {"title": EVIL, "subtitle": EVIL},
        {"headline": [{"label": EVIL, "value": EVIL}]},
        {"evals": [{"step": 1, "loss": 1.0, "prompt": EVIL, "answer": EVIL}]},
        {"evals": [{"step": i, "loss": 1.0, "prompt": EVIL * i, "answer": EVIL} for i in (1, 2)]},
        {"answers": [{"prompt": EVIL, "before": EVIL, "after": EVIL}]},
        {"memory": [{"name": EVIL, "bytes": 10, "note": EVIL}]},
        {"parameters": [{"name": EVIL, "total": 1, "trainable": 1, "bits": 4}]},
        {"layers": [{"path": f"{EVIL}.{i}.{EVIL}", "ratio": ratio} for i, ratio in enumerate((0.5, math.nan))]},
        {"layers": [{"path": EVIL, "ratio": 0.5}]},
        {"spectrum": [{"path": path, "values": [1.0, 0.0]} for path in (EVIL, "other")]},
        {"settings": {EVIL: EVIL}, "versions": {EVIL: EVIL}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_texts_are_escaped_everywhere(changes):
    plain, page = parse(render(full_run())), render({"title": "a run"} | changes)
    parser = parse(page)
    assert set(parser.tags) <= set(plain.tags)
    assert "onload" not in {name for name, _ in parser.attributes}
    assert "<script>alert('x')</script> &" in "".join(parser.texts)  # there to be read, as text
    svgs(page)
    page.encode("utf-8")  # a lone surrogate would raise here


def test_empty_run_is_a_page_without_sections():
    page = render({"title": "nothing yet"})
    parse(page)
    assert "<section" not in page and "<svg" not in page and "recorded nothing" in page
    empty = {key: [] for key in full_run() if key not in ("title", "subtitle", "settings", "versions")}
    assert render({"title": "nothing yet", "settings": {}, **empty}) == page


def test_title_is_required():
    with pytest.raises(ValueError, match=r"'title'.*steps"):
        render({"steps": []})


@pytest.mark.parametrize("key", [key for key in full_run() if key != "title"])
def test_each_key_alone_and_each_key_missing(key):
    run = full_run()
    for part in ({"title": "x", key: run[key]}, {name: value for name, value in run.items() if name != key}):
        page = render(part)
        parse(page)
        svgs(page)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_not_finite_is_a_gap_with_a_name(bad):
    run = full_run()
    run["steps"][19]["loss"] = bad
    page = render(run)
    assert re.search(r"Training loss: 1 of 40 not drawn: (nan|-?inf) at 20\.", page)
    for css in ("c0 thin", "c0"):
        drawn = curve(picture_of(page, "Loss"), css)
        assert [index for index, (pen, _, _) in enumerate(drawn) if pen == "M"] == [0, 19]
        assert len(drawn) == 39


def test_a_run_of_nothing_but_nan_still_is_a_page():
    run = full_run(evals=[], spectrum=[{"path": "a.0.b", "values": [0.0, math.nan]}])
    run["steps"] = [step(i, math.nan, grad_norm=math.nan) for i in (1, 2)]
    run["layers"] = [{"path": path, "ratio": math.nan} for path in PATHS]
    page = render(run)
    parse(page)
    svgs(page)
    assert "Training loss: 2 of 2 not drawn: nan at 1, nan at 2." in page
    assert "a.0.b: 2 of 2 not drawn: 0 at 1, nan at 2." in page
    assert page.count("nothing here can be drawn") == 3


def test_a_finite_value_alone_between_gaps_is_a_dot():
    losses = [1.0] * 60
    losses[29] = losses[31] = math.nan
    picture = picture_of(render({"title": "x", "steps": [step(i, x) for i, x in enumerate(losses)]}), "Loss")
    assert curve(picture, "c0 thin")[29][0] == "M" and curve(picture, "c0 thin")[30][0] == "M"
    (path,) = [path for path in picture.iter("path") if path.get("class") == "c0 thin"]
    assert path.get("d").count("h0") == 3


def test_one_step_is_drawn_inside_the_picture():
    page = render({"title": "x", "steps": [step(7, 2.5)]})
    picture = picture_of(page, "Loss")
    (circle,) = picture.iter("circle")
    _, _, width, height = map(float, picture.get("viewBox").split())
    assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height
    assert "mean of" not in page


@pytest.mark.parametrize("value", [0.0, 1e-40, 3.0, -3.0, 1e38])
def test_a_constant_curve_lies_flat_inside_the_picture(value):
    picture = picture_of(render({"title": "x", "steps": [step(i, value) for i in range(5)]}), "Loss")
    heights = {y for _, _, y in curve(picture)}
    assert len(heights) == 1 and 0 < heights.pop() < 400


def test_ten_thousand_steps_stay_small_and_keep_their_spikes():
    steps = [step(i, 2 + math.sin(i), grad_norm=float(i % 97)) for i in range(10_000)]
    steps[5_003]["loss"], steps[7_777]["loss"] = 50.0, -10.0
    page = render(full_run(steps=steps))
    assert len(page.encode()) < 1_000_000
    picture = picture_of(page, "Loss")
    drawn = curve(picture, "c0 thin")
    assert 200 < len(drawn) <= MOST_POINTS
    heights = sorted(y for _, _, y in drawn)
    assert heights[1] - heights[0] > 100  # the spike up, far above all others
    assert heights[-1] - heights[-2] > 20  # and the spike down
    assert [x for _, x, _ in drawn] == sorted(x for _, x, _ in drawn)
    alternate = [step(i, 1.0 if i % 2 else math.nan) for i in range(10_000)]
    assert len(render({"title": "x", "steps": alternate}).encode()) < 1_000_000


def test_axes_are_round_and_labelled():
    page = render(full_run())
    loss = labels(picture_of(page, "Loss"))
    assert loss[:2] == ["optimizer step", "loss (nats per token)"]
    assert loss[2:] == ["2.0", "2.5", "3.0", "3.5", "4.0", "10", "20", "30", "40"]
    assert {"5e-5", "1.0e-4", "2.0e-4"} <= set(labels(picture_of(page, "Learning rate")))
    assert {"0", "1,000", "2,000"} <= set(labels(picture_of(page, "Throughput")))
    assert {"0.001", "0.01", "0.1", "1"} <= set(labels(picture_of(page, "Singular values")))


def test_log_axis_gives_each_decade_the_same_room():
    (_, _, first), (_, _, second), (_, _, third) = curve(picture_of(render(full_run()), "Singular values"))
    assert third - second == pytest.approx(2 * (second - first), abs=0.3)  # 1, 0.1, 0.001


def test_evaluations_lie_on_the_curve_that_they_equal():
    picture = picture_of(render(full_run()), "Loss")
    line = curve(picture, "c0 thin")
    dots = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in picture.iter("circle")]
    assert dots == [(x, y) for _, x, y in (line[0], line[19], line[39])]


def test_measures_that_are_absent_lose_only_their_curve():
    steps = [{"step": i, "loss": 1.0 + i, "grad_norm": None if i % 2 else 1.0} for i in range(20)]
    page = render({"title": "x", "steps": steps})
    assert [picture.get("aria-label").split(" by ")[0] for picture in svgs(page)] == ["Loss", "Gradient norm"]
    assert "not drawn" not in page
    assert len(curve(picture_of(page, "Gradient norm"))) == 10


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1536, "1.54 KB"),
        (999_949, "1 MB"),
        (1_234_567_890, "1.23 GB"),
        (2e13, "20 TB"),
    ],
)
def test_bytes_are_shown_in_powers_of_1000(count, text):
    page = render({"title": "x", "memory": [{"name": "weights", "bytes": count, "note": ""}]})
    assert f'<td class="num">{text}</td>' in page and "powers of 1000" in page


def test_bars_are_in_proportion():
    entries = [{"name": name, "bytes": size, "note": ""} for name, size in (("a", 200), ("b", 50), ("c", 0))]
    assert bars(render({"title": "x", "memory": entries})) == ["100.0", "25.0", "0.0"]


def test_parameters_have_separators_and_shares():
    page = render(full_run(parameters=[{"name": "a", "total": 1_000_000, "trainable": 2_500, "bits": 4.127}]))
    cells = re.findall(r'<td class="num">(.*?)</td>', page[page.index("<h2>Parameters") :])
    assert cells[:4] == ["1,000,000", "2,500", "0.25 %", "4.127"]
    assert "<td" in render({"title": "x", "parameters": [{"name": "none", "total": 0, "trainable": 0, "bits": 0}]})


def test_heat_map_has_one_named_cell_a_layer():
    layers = [{"path": path, "ratio": 0.01 * number} for number, path in enumerate(PATHS, 1)]
    layers.append({"path": "lm_head", "ratio": math.nan})
    picture = picture_of(render({"title": "x", "layers": layers}), "Heat map")
    cells = list(picture.iter("rect"))
    tips = [f"{path}: {0.01 * number:.4g}" for number, path in enumerate(PATHS, 1)]
    assert [cell.find("title").text for cell in cells] == [*tips, "lm_head: nan"]
    assert len({(cell.get("x"), cell.get("y")) for cell in cells}) == 7
    assert len({cell.get("y") for cell in cells}) == 3 and len({cell.get("x") for cell in cells}) == 4
    assert cells[5].get("fill") == "#fee838" and cells[6].get("class") == "hole"  # the most, and the unknown
    assert {"q_proj", "v_proj", "lm_head", "0", "1", "2", "0.03", "0.06"} <= set(labels(picture))


def test_layers_that_would_share_a_cell_get_rows_of_their_own():
    paths = [f"{side}.{index}.mlp.{expert}.up" for side in ("enc", "dec") for index in (0, 1) for expert in range(3)]
    picture = picture_of(render({"title": "x", "layers": [{"path": p, "ratio": 0.1} for p in paths]}), "Heat map")
    cells = list(picture.iter("rect"))
    assert len({(cell.get("x"), cell.get("y")) for cell in cells}) == len(paths)
    assert "enc.*.mlp.2.up" in labels(picture)
    long = [
        {"path": f"{side}.{index}.mlp.experts.{index}.gate_proj", "ratio": 0.1} for side in "ab" for index in (0, 1)
    ]
    names = labels(picture_of(render({"title": "x", "layers": long}), "Heat map"))[:4]
    assert len(set(names)) == 4 and all("…" in name for name in names)


def test_layers_without_an_index_are_bars():
    layers = [{"path": "encoder.proj", "ratio": 0.04}, {"path": "w2v.head", "ratio": 0.01}]
    page = render({"title": "x", "layers": layers})
    assert "<svg" not in page and bars(page) == ["100.0", "25.0"]
    assert "Most: encoder.proj (0.04). Least: w2v.head (0.01)." in page


def test_one_prompt_is_said_once_and_several_are_a_column():
    page = render(full_run())
    assert page.count("Who?") == 1 and "<th>prompt</th>" not in page and "answer 20" in page
    evals = [{"step": i, "loss": 1.0, "prompt": f"Who {i}?", "answer": None} for i in (1, 2)]
    page = render({"title": "x", "evals": evals})
    assert "<th>prompt</th>" in page and "<th>answer</th>" not in page
