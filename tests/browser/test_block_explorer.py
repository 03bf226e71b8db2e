"""The block explorer of the site (``docs/static/explorer/block.html``) equals minilora, to the last code, byte and bit.

Headless Chromium opens the page itself, with one more script at its end. That script uses the controls as a reader does, reads what the
page shows, and leaves it in the page, which Chromium prints. So no driver is needed beside the browser, and no network.
"""

import functools
import html
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from minilora import QuantConfig, quantize
from minilora.quant.lookup import unpack

EXPLORER = Path(__file__).resolve().parents[2] / "docs" / "static" / "explorer"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
FORMATS = ("nf4", "fp4", "int4", "nf3", "nf2", "sf4", "e2m1", "af4", "bof4s")

# What a reader can do and see: `at` finds an element, `choose` changes a control, `seen` is all that the page shows of the result.
READER = """
const at = (id) => document.getElementById(id);
const choose = (id, value) => {
  if (at(id).type === "checkbox") at(id).checked = value; else at(id).value = value;
  at(id).dispatchEvent(new Event("change", { bubbles: true }));
};
const paste = (numbers) => { at("pasted").value = numbers.join(" "); at("own").querySelector("button").click(); };
const cells = (id) => [...at(id).rows].map((row) => [...row.cells].map((cell) => cell.textContent));
const figures = () => [...document.querySelectorAll("#figures dd")].map((figure) => figure.textContent);
function seen() {
  const weights = [];
  for (const { value } of [...at("piece").options]) { choose("piece", value); weights.push(...cells("weights")); }
  const bytes = [...document.querySelectorAll("#bytes i")].map((byte) => byte.textContent);
  return { weights, bytes, scales: cells("scales"), nested: at("nested").textContent, figures: figures() };
}
function press(key) {
  const before = document.activeElement;
  before.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
}
function pointer(kind, x, y) {
  const where = { pointerId: 1, button: 0, clientX: x, clientY: y, bubbles: true, cancelable: true };
  at("editor").dispatchEvent(new PointerEvent(kind, where));
}
"""


def read(tmp_path, script, given=None):
    """What ``script``, the body of a function of ``given``, returns in the page."""
    folder = tmp_path / "explorer"
    shutil.copytree(EXPLORER, folder)
    page = (folder / "block.html").read_text(encoding="utf-8")
    driver = f"{READER}\nlet said;\ntry {{ said = ((given) => {{ {script} }})({json.dumps(given)}); }}\n"
    driver += "catch (error) { said = { failed: String(error.stack) }; }\n"
    driver += 'document.body.append(Object.assign(document.createElement("pre"), {id: "said", textContent: JSON.stringify(said)}));'
    (folder / "driver.js").write_text(driver, encoding="utf-8")
    (folder / "block.html").write_text(page.replace("</body>", '<script src="driver.js"></script></body>'))
    command = [BROWSER, "--headless=new", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += ["--window-size=1000,1400", *["--no-sandbox"] * (os.geteuid() == 0)]  # Chromium has no sandbox for root
    done = subprocess.run([*command, (folder / "block.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    said = json.loads(html.unescape(found.group(1)))
    assert not isinstance(said, dict) or "failed" not in said, said["failed"]
    return said


def bits(numbers):
    """The bits of float32 numbers, as integers; -0 is another than 0."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float32).view(torch.int32).tolist()


# ---- the blocks


@functools.cache
def cases():
    """A hundred weights, each with a config: random, of few values (ties), zeros, with an outlier, tiny or huge; whole blocks or ragged."""
    pick, numbers = random.Random(0), torch.Generator().manual_seed(0)
    made = []
    for number in range(100):
        blocksize = pick.choice([32, 64, 64, 128, 256])
        count = pick.choice([blocksize * pick.randint(1, max(1, 256 // blocksize)), pick.randint(1, 200)])
        weight = torch.randn(count, generator=numbers) * pick.choice([1, 1, 0.02, 1e-37, 1e15])
        if number % 5 == 1:
            weight[pick.randrange(count)] *= pick.choice([12, 1000])
        if (
            number % 5 == 2
        ):  # values that lie on levels and half way between levels of INT4 and E2M1, with equal largest magnitudes
            weight = (weight / weight.abs().max() * 28).round().clamp(-24, 24) / 24
        if number % 5 == 3:
            weight[: pick.choice([blocksize, count])] = 0
        config = QuantConfig(
            FORMATS[number % len(FORMATS)],
            blocksize,
            double_quant=pick.random() < 0.5,
            scale=pick.choice(["absmax", "mse"]),
            signed_scale=pick.random() < 0.4,
        )
        made.append((weight, config))
    return made


def quantized(weight, config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stay in fp32")
        return quantize(weight, config)


def test_the_blocks_are_of_every_kind():
    made = [(weight, config, quantized(weight, config)) for weight, config in cases()]
    for name in FORMATS:
        assert {config.scale for _, config, _ in made if config.format == name} == {"absmax", "mse"}
    nested = [packed.nested_absmax is not None for _, _, packed in made]
    asked = [config.double_quant for _, config, _ in made]
    assert sum(nested) > 30 and sum(asked) > sum(nested), "some scales are packed, and some are kept for an outlier"
    assert any((packed.scales() < 0).any() for _, _, packed in made)
    assert any(len(weight) % config.blocksize for weight, config, _ in made)
    assert any(not weight.any() for weight, _, _ in made)


@NEEDS_BROWSER
@pytest.mark.browser
def test_a_hundred_blocks_equal_minilora_to_the_bit(tmp_path):
    script = """
      return given.map(({ weight, format, blocksize, scale, signed, nested }) => {
        for (const [id, value] of Object.entries({ format, blocksize, scale })) at(id).value = value;
        at("signed-scale").checked = signed;
        at("double-quant").checked = nested;
        paste(weight);
        return { ...seen(), refused: at("refused").textContent };
      });"""
    given = [
        {
            "weight": [str(value) for value in weight.tolist()],  # a number of JavaScript would lose the sign of -0
            "format": config.format,
            "blocksize": config.blocksize,
            "scale": config.scale,
            "signed": config.signed_scale,
            "nested": config.double_quant,
        }
        for weight, config in cases()
    ]
    shown = read(tmp_path, script, given)
    assert len(shown) == 100
    for number, ((weight, config), page) in enumerate(zip(cases(), shown, strict=True)):
        packed, count = quantized(weight, config), len(weight)
        _, values, _, codes, as_bits, levels, decoded, _ = zip(*page["weights"], strict=True)
        assert page["refused"] == "" and bits(values) == bits(weight.tolist()), number
        wanted = unpack(packed.packed, packed.book.bits, count)
        assert [int(code) for code in codes] == [int(code, 2) for code in as_bits] == wanted.tolist(), (number, config)
        assert bits(levels) == bits(packed.book.table()[wanted.long()].tolist())
        assert "".join(page["bytes"]) == bytes(packed.packed.tolist()).hex(), (number, config)
        assert bits(decoded) == bits(packed.dequantize().tolist()), (number, config)
        check_scales(page, packed, number)
        assert float(page["figures"][0]) == pytest.approx(packed.bits_per_weight, rel=1e-3)
        assert int(page["figures"][2]) == packed.nbytes


def check_scales(page, packed, number):
    """The scales that the page shows, in 8 bits or not."""
    _, chosen, codes, used = zip(*page["scales"], strict=True)
    assert bits(used) == bits(packed.scales().tolist()), number
    if packed.nested_absmax is None:
        assert set(codes) == {"-"} and bits(chosen) == bits(packed.absmax.tolist()), number
        return
    assert [int(code) for code in codes] == packed.absmax.tolist(), number
    offset, largest = re.search(r"their mean (\S+), .*difference (\S+), is stored", page["nested"]).groups()
    assert bits([offset, largest]) == bits([*packed.nested_offset.tolist(), *packed.nested_absmax.tolist()]), number


# ---- hands


@NEEDS_BROWSER
@pytest.mark.browser
def test_each_setting_counts_as_soon_as_it_is_chosen(tmp_path):
    steps = [("format", "nf2"), ("blocksize", 128), ("scale", "mse"), ("signed-scale", True), ("double-quant", True)]
    script = (
        "return given.map(([id, value]) => { choose(id, value); return { ...seen(), format: at('format').value }; });"
    )
    fields = {"signed-scale": "signed_scale", "double-quant": "double_quant"}
    chosen, shown = {}, read(tmp_path, script, steps)
    weight = torch.tensor([float(row[1]) for row in shown[0]["weights"]])
    assert len(weight) == 256
    for (name, value), page in zip(steps, shown, strict=True):
        chosen[fields.get(name, name)] = value
        packed = quantize(weight, QuantConfig(**chosen))
        assert bits(row[6] for row in page["weights"]) == bits(packed.dequantize().tolist()), name
        assert float(page["figures"][0]) == pytest.approx(packed.bits_per_weight, rel=1e-3)
    assert float(page["figures"][1]) == pytest.approx(2 + 8 / 128 + 32 / 128 / 256, abs=1e-3)


@NEEDS_BROWSER
@pytest.mark.browser
def test_the_keyboard_and_the_pointer_change_a_weight(tmp_path):
    script = """
      const said = {};
      const now = (name) => {
        const [place, value, kind] = ["place", "value", "kind"].map((id) => at(id).value);
        const code = cells("weights").find((row) => row[0] === place)[3];
        said[name] = { place, value, kind, code, focus: document.activeElement.getAttribute("aria-label") };
      };
      choose("kind", "zeros");
      at("editor").querySelector("[tabindex='0']").focus();
      now("start");
      press("ArrowRight"); press("ArrowRight"); press("ArrowUp"); now("up");
      press("PageDown"); now("down");
      for (let i = 0; i < 20; i++) press("PageUp");
      now("raised");
      press("End"); press("ArrowRight"); press("ArrowUp"); now("next block");
      press("0"); now("zero");
      press("Home"); press("ArrowLeft"); now("back");
      choose("place", "7"); choose("value", "-3.5"); now("typed");
      const box = at("editor").getBoundingClientRect();
      const edges = Charts.edges, wide = (box.width - edges.left - edges.right) / 64, high = box.height - edges.top - edges.bottom;
      const x = box.left + edges.left + 9.5 * wide, top = box.top + edges.top;
      at("editor").setPointerCapture = () => {};  // a made event has no pointer to capture
      at("editor").hasPointerCapture = () => true;
      pointer("pointerdown", x, top + high / 2); now("grabbed");
      pointer("pointermove", x + 40, top + high / 4); now("dragged");
      pointer("pointermove", x, top - 50); now("beyond");
      return said;"""
    said = read(tmp_path, script)
    at = {name: (one["place"], float(one["value"])) for name, one in said.items()}
    assert at["start"] == ("1", 0.0)
    assert at["up"] == ("3", 1 / 128) and at["down"] == ("3", -7 / 128)
    assert at["raised"][1] > 1.2, "the axis grows with the weight, and so do the steps"
    assert at["next block"] == ("65", 1 / 128) and at["zero"] == ("65", 0.0) and at["back"] == ("64", 0.0)
    assert at["typed"] == ("7", -3.5)  # the axis grows to 4
    assert at["grabbed"] == ("10", 0.0) and at["dragged"] == ("10", 2.0) and at["beyond"] == ("10", 4.0)
    assert said["start"]["kind"] == "zeros" and said["up"]["kind"] == "own"
    assert [one["focus"] for one in said.values()][:7] == [f"Weight {place}" for place in (1, 3, 3, 3, 65, 65, 64)]
    assert (said["start"]["code"], said["up"]["code"], said["typed"]["code"]) == ("7", "15", "0")


@NEEDS_BROWSER
@pytest.mark.browser
def test_draws_differ_by_seed_and_what_is_wrong_is_refused(tmp_path):
    script = """
      const drawn = () => { const all = seen().weights.map((row) => row[1]); choose("piece", 0); return all; };
      const said = { first: drawn() };
      at("again").click(); said.again = drawn();
      choose("seed", 1); said.same = drawn();
      choose("kind", "student"); said.student = drawn();
      choose("kind", "outlier"); said.outlier = drawn();
      choose("count", 70); said.fewer = drawn();
      const refused = {};
      const refuse = (name) => { refused[name] = [at("refused").textContent, drawn().length]; };
      choose("count", 0); refuse("count"); choose("count", 70);
      paste(["1", "abc"]); refuse("word"); paste(["1", "2", "1e39"]); refuse("large"); paste([]); refuse("none");
      choose("value", "1e39"); refuse("value");
      choose("double-quant", true); paste(Array(128).fill("3e38")); refuse("mean"); said.nested = at("double-quant").checked;
      return { ...said, refused };"""
    said = read(tmp_path, script)
    assert said["first"] == said["same"] != said["again"] and len(said["first"]) == 256 and len(said["fewer"]) == 70
    assert [float(one) for one in said["outlier"]].index(8.0) == 19 and said["student"] != said["first"]
    first = torch.tensor([float(one) for one in said["first"]])
    assert abs(first.mean()) < 0.2 and abs(first.std() - 1) < 0.15
    refused = {name: message for name, (message, _) in said["refused"].items()}
    assert refused == {
        "count": "How many: wanted a whole number from 1 to 4096.",
        "word": 'Number 2, "abc", is not a finite float32 number.',
        "large": 'Number 3, "1e39", is not a finite float32 number.',
        "none": "0 numbers; wanted 1 to 4096.",
        "value": "Its value: wanted a finite float32 number.",
        "mean": "The mean of the scales overflows float32; turn double quantization off.",
    }
    assert {count for name, (_, count) in said["refused"].items() if name != "mean"} == {70}
    assert said["nested"] is False


@NEEDS_BROWSER
@pytest.mark.browser
def test_every_control_has_a_label_and_every_axis_too(tmp_path):
    script = """
      const controls = [...document.querySelectorAll("input, select, textarea")];
      const axes = (id) => [...at(id).querySelectorAll("text")].map((text) => text.textContent);
      return { controls: controls.length, without: controls.filter((one) => !one.labels.length).map((one) => one.id),
        axes: ["editor", "density", "error"].map(axes), stops: document.querySelectorAll("#editor [tabindex='0']").length,
        wide: document.documentElement.scrollWidth <= innerWidth };"""
    said = read(tmp_path, script)
    assert said["controls"] == 12 and said["without"] == [] and said["stops"] == 1 and said["wide"]
    labels = [
        {"weight", "number of the weight"},
        {"density", "weight / scale of the block"},
        {"error", "number of the weight"},
    ]
    assert all(wanted <= set(found) for wanted, found in zip(labels, said["axes"], strict=True))


# ---- the files, which need no browser


def test_the_tables_are_those_of_minilora():
    made = runpy.run_path(str(EXPLORER.parents[1] / "block_tables.py"))
    assert made["FORMATS"] == FORMATS
    assert (EXPLORER / "tables.js").read_text(encoding="utf-8") == made["script"](), "run: python docs/block_tables.py"


def test_the_page_asks_nothing_of_a_network():
    """Its files stand beside it, and nothing in them can ask for more."""
    page = (EXPLORER / "block.html").read_text(encoding="utf-8")
    asked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {one for one in asked if one not in ("data:,", "../../explorer.html")} == {
        path.name for path in EXPLORER.iterdir() if path.name != "block.html"
    }
    text = "".join(path.read_text(encoding="utf-8") for path in EXPLORER.iterdir()).replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert not re.search(r"https?:|//www|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|\bimport\b[ (]|url\(", text)
