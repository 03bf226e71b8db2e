"""The page of claims says what was claimed and found, and shows its figures; it is made from ``lab.json`` alone."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from minilora.lab.ground.ground import Ground
from minilora.lab.trying import page, tries
from minilora.lab.trying.page import write_page
from minilora.lab.trying.tried import Tried, read, write
from tests.lab.planted import FINDS, plant

pytest.importorskip("matplotlib")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    names = plant(monkeypatch, tmp_path, one=FINDS, bare='return Finding(FAILS, "Not so.")')
    return {name: tries.try_claim(name, Ground(7)) for name in names}


def sections(folder):
    top, *parts = re.split(r"^## ", (folder / "lab.md").read_text(), flags=re.M)
    return top, {part.split("\n")[0]: part for part in parts}


def test_a_table_of_all_and_a_section_each(tried, tmp_path):
    failed = Tried(tried["one"].claim, "lab/claims/x", "", 7, failed="No <room> left")
    write_page(tmp_path, tried | {"zero": failed.__class__(**{**vars(failed), "claim": named(failed.claim, "zero")})})
    top, parts = sections(tmp_path)
    assert re.findall(r"^\| \[(\w+)\]\(#(\w+)\) \| (.*) \| ([a-z ]+) \|", top, re.M) == [
        ("bare", "bare", r"It \*is\* so \| or not.", "fails here"),
        ("one", "one", r"It \*is\* so \| or not.", "holds here"),
        ("zero", "zero", r"It \*is\* so \| or not.", "could not be tried"),
    ]
    assert "**Holds here.** It took 7 steps." in parts["one"] and "Somebody 2025, section 3" in parts["one"]
    assert "| what | loss | by seed | more |" in parts["one"] and r"| b\_b |  |  | inf |" in parts["one"]
    assert "| a | 1.1 (0.8516 to 1.348) | 2.25 (-0.9266 to 5.427) |  |" in parts["one"].replace(" 5.426 ", " 5.427 ")
    assert "{image}" not in parts["bare"] and "|" not in parts["bare"].replace(r"\|", "")
    assert r"**Could not be tried**: No \<room\> left" in parts["zero"]


def named(claim, name):
    return claim.__class__(**{**vars(claim), "name": name})


def test_figures_lie_beside_it_for_light_and_dark(tried, tmp_path):
    write_page(tmp_path, tried)
    text = (tmp_path / "lab.md").read_text()
    shown = re.findall(r"^```\{image\} (lab/[\w-]+\.svg)\n:alt: (.*)\n:class: only-(\w+)\n```$", text, re.M)
    assert [(file, look) for file, _, look in shown] == [("lab/one.svg", "light"), ("lab/one-dark.svg", "dark")]
    assert shown[0][1] == "loss (nats a byte) over rate, a curve each for a, b"
    drawn = [(tmp_path / file).read_text() for file, _, _ in shown]
    assert "#0072b2" in drawn[0] and "#56b4e9" in drawn[1] and "var(" not in "".join(drawn)
    assert all(ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg" for svg in drawn)


def test_it_is_built_again_from_the_file_alone(tried, tmp_path):
    write(tmp_path, tried)
    write_page(tmp_path, tried)
    files = [tmp_path / "lab.md", *(tmp_path / "lab").iterdir()]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    write_page(tmp_path, read(tmp_path))
    assert [file.read_bytes() for file in files] == before


def test_without_matplotlib_there_are_words_alone(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "missing", lambda: "matplotlib is missing")
    write_page(tmp_path, tried)
    assert not (tmp_path / "lab").exists() and "{image}" not in (tmp_path / "lab.md").read_text()


@pytest.mark.parametrize(("seconds", "words"), [(0.04, "0.0 s"), (12.4, "12 s"), (119, "119 s"), (512, "9 min")])
def test_a_time_has_its_unit(seconds, words):
    assert page._time(seconds) == words


def test_times_are_added_up_and_a_line_that_leaves_the_picture_is_explained(tried, tmp_path):
    write_page(tmp_path, tried)
    text = (tmp_path / "lab.md").read_text()
    whole = page._time(sum(one.seconds for one in tried.values()))
    assert f"The times are of one thread each, {whole} together" in text and "leaves the picture" not in text
    one = tried["one"]
    for before, leaves in ((-1.0, True), (1e9, False)):
        picture = dataclasses.replace(one.finding.picture, before=before)
        write_page(
            tmp_path, {"one": dataclasses.replace(one, finding=dataclasses.replace(one.finding, picture=picture))}
        )
        assert ("leaves the picture is worse there" in (tmp_path / "lab.md").read_text()) is leaves
