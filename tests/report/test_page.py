"""The report page: whole, safe, self-contained, and right about its numbers, whatever a run recorded."""

import functools
import math
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from minilora.report import frame
from minilora.report.page import as_page, render
from minilora.report.svg import COLOURS
from minilora.report.tables import Row

pytest.importorskip("matplotlib")

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


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@functools.cache
def full_page():
    """The page of ``full_run()``, drawn once."""
    return render(full_run())


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


HEADINGS = [
    "Training",
    "How the answer changed while training",
    "Before and after",
    "Memory",
    "Parameters",
    "How far each layer moved",
    "Spectrum of the updates",
    "Settings and versions",
]


def test_full_page_parses_and_holds_every_section():
    assert re.findall(r"<h2>(.*?)</h2>", full_page()) == HEADINGS
    parse(full_page())
    drawn = [picture.get("aria-label").split(":")[0] for picture in svgs(full_page())]
    assert drawn == [  # the wide ones a second time, for a phone
        *["Loss, training"] * 2, "Learning rate", "Gradient norm", "Throughput", "Memory of the process",
        *["Bars of memory"] * 2, *["‖ΔW‖ / ‖W‖ of 6 layers. Most"] * 2, *["Singular values by rank. " + PATHS[0]] * 2,
    ]  # fmt: skip
    assert "No pictures" not in full_page()


def test_page_needs_nothing_else():
    page = full_page()
    parser = parse(page)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(parser.tags)
    assert not {"src", "href", "xlink:href", "srcset", "id"} & {name for name, _ in parser.attributes}
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page


def test_every_colour_of_a_picture_is_one_of_the_page_in_the_light_and_in_the_dark():
    style = full_page()[full_page().index("<style>") : full_page().index("</style>")]
    light, dark = style.split("@media(prefers-color-scheme:dark)", 1)
    for name, (by_day, by_night) in COLOURS.items():
        assert f"--{name}:{by_day}" in light and f"--{name}:{by_night}" in dark
    used = set(re.findall(r"var\(--([\w]+)\)", full_page()))
    assert used - {"shade"} <= set(COLOURS) and {"soft", "line", "c0", "c1"} <= used


def test_the_same_run_gives_the_same_bytes_whatever_style_the_process_has():
    import matplotlib.style

    run = {"title": "x", "spectrum": full_run()["spectrum"]}
    plain = render(run)
    with matplotlib.style.context(["dark_background", {"font.size": 20, "axes.grid": False}]):
        assert render(run) == plain


def test_a_phone_has_pictures_of_its_own_and_only_one_of_a_pair_is_shown():
    sizes = [float(svg.get("viewBox").split()[2]) / 72 for svg in svgs(full_page())]
    assert max(sizes) == pytest.approx(7.2) and {round(size, 1) for size in sizes[1::2]} == {3.5}
    assert full_page().count('class="scroll roomy"') == full_page().count('class="scroll phone"') == 4
    assert ".phone{display:none}" in frame._STYLE and ".roomy{display:none}.phone{display:block}" in frame._STYLE


def test_without_matplotlib_there_are_no_pictures_and_one_line_says_so(without_matplotlib):
    page = render(full_run())
    parse(page)
    assert "<svg" not in page and re.findall(r"<h2>(.*?)</h2>", page) == [h for h in HEADINGS if "Spectrum" not in h]
    (line,) = re.findall(r"<p>(No pictures: .*?)</p>", page)
    assert "matplotlib" in line and "pip install &quot;minilora[plot]&quot;" in line
    assert "Loss, training: first 3.95 at 1" in page and "Most: model.layers.2.attn.v_proj (0.06)" in page
    assert '<td class="num">1.23 GB</td>' in page
    compared = as_page("t", "s", [], ["one"], [Row("a", ["1"], [1.0])], [], {"one": [2.0, 1.0]})
    assert "<svg" not in compared and compared.count("No pictures: ") == 1 and ">a<" in compared


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
    plain, page = parse(full_page()), render({"title": "a run"} | changes)
    parser = parse(page)
    assert set(parser.tags) <= set(plain.tags) | {"title"}
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
def test_each_key_alone_and_each_key_missing(key, monkeypatch):
    run = full_run()
    page = render({"title": "x", key: run.pop(key)})
    parse(page)
    svgs(page)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the pictures of all other keys have been drawn already
    parse(render(run))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_not_finite_is_named(bad):
    steps = [step(i, bad if i == 20 else 1.0) for i in range(1, 41)]
    page = render({"title": "x", "steps": [{"step": each["step"], "loss": each["loss"]} for each in steps]})
    assert re.search(r"Training loss: 1 of 40 not drawn: (nan|-?inf) at 20\.", page)
    assert len(svgs(page)) == 2


def test_a_run_of_nothing_but_nan_still_is_a_page():
    run = full_run(evals=[], spectrum=[{"path": "a.0.b", "values": [0.0, math.nan]}])
    run["steps"] = [step(i, math.nan, grad_norm=math.nan) for i in (1, 2)]
    run["layers"] = [{"path": path, "ratio": math.nan} for path in PATHS]
    page = render(run)
    parse(page)
    svgs(page)
    assert "Training loss: 2 of 2 not drawn: nan at 1, nan at 2." in page
    assert "a.0.b: 2 of 2 not drawn: 0 at 1, nan at 2." in page
    assert page.count("nothing here can be drawn") == 4


@pytest.mark.parametrize(("count", "every"), [(10_000, 1), (2_000, 2)], ids=["whole", "gaps"])
def test_many_steps_are_a_small_page(count, every):
    losses = [2 + math.sin(i) if i % every == 0 else math.nan for i in range(count)]
    page = render({"title": "x", "steps": [{"step": i, "loss": loss} for i, loss in enumerate(losses)]})
    assert len(page.encode()) < 500_000  # though a value between two gaps is a point that says what it is


def test_measures_that_are_absent_lose_only_their_curve():
    steps = [{"step": i, "loss": 1.0 + i, "grad_norm": None if i % 2 else 1.0} for i in range(20)]
    page = render({"title": "x", "steps": steps})
    said = [picture.get("aria-label") for picture in svgs(page)]
    assert len(said) == 3 and said[0] == said[1] and said[0].startswith("Loss, training: first 1 at 0, last 20 at 19")
    assert said[2].startswith("Gradient norm: first 1 at 0, last 1 at 18")
    assert "not drawn" not in page


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


def test_parameters_have_separators_and_shares():
    page = render({"title": "x", "parameters": [{"name": "a", "total": 1_000_000, "trainable": 2_500, "bits": 4.127}]})
    cells = re.findall(r'<td class="num">(.*?)</td>', page[page.index("<h2>Parameters") :])
    assert cells[:4] == ["1,000,000", "2,500", "0.25 %", "4.127"]
    assert "<td" in render({"title": "x", "parameters": [{"name": "none", "total": 0, "trainable": 0, "bits": 0}]})


def test_the_extremes_and_the_outliers_of_the_layers_are_named():
    layers = [{"path": f"model.layers.{index}.q", "ratio": 0.01 + 0.001 * index} for index in range(9)]
    page = render({"title": "x", "layers": layers})
    assert "Most: model.layers.8.q (0.018). Least: model.layers.0.q (0.01)." in page and "Far beyond" not in page
    page = render({"title": "x", "layers": [*layers, {"path": "model.layers.9.q", "ratio": 7.0}]})
    assert "Far beyond the rest, and outside the scale of colours: model.layers.9.q." in page
    bars = [{"path": path, "ratio": ratio} for path, ratio in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 99.0))]
    page = render({"title": "x", "layers": bars})
    assert "Most: d (99). Least: a (1)." in page and "Far beyond" not in page and len(svgs(page)) == 2


def test_one_prompt_is_said_once_and_several_are_a_column():
    page = full_page()
    assert page.count("Who?") == 1 and "<th>prompt</th>" not in page and "answer 20" in page
    evals = [{"step": i, "loss": 1.0, "prompt": f"Who {i}?", "answer": None} for i in (1, 2)]
    page = render({"title": "x", "evals": evals})
    assert "<th>prompt</th>" in page and "<th>answer</th>" not in page


# ---- side by side


def test_a_comparison_has_bars_table_losses_and_settings():
    rows = [Row("time (s)", ["1.5", "3.0", "2.00x"], [1.5, 3.0], "time"), Row("steps", ["4", "4", ""])]
    losses = {"ours": [2.0, 1.0], "theirs": [2.0, math.nan]}
    page = as_page("t", "s", [], ["ours", "theirs", "ratio"], rows, ["a note"], losses, {"r": 8})
    parse(page)
    said = [picture.get("aria-label") for picture in svgs(page)]
    assert said[0] == said[1] == "Bars: time (s) 1.5 and 3.0 and 2.00x"
    assert said[2].startswith("Loss by optimizer step. ours: first 2 at 1, last 1 at 2") and said[3] == said[2]
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Side by side", "The same losses", "Settings"]
    for text in ("1.5", "2.00x", "steps", "a note"):
        assert f">{text}<" in page
    alone = as_page("t", "s", [], ["one"], rows[1:], [])
    assert "<svg" not in alone and "The same losses" not in alone and "Settings" not in alone
