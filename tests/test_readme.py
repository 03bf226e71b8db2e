"""The README is short, says what it has to say, and shows the report. What it names is tested with the other pages: ``test_docs.py``."""

import re
import struct
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_it_says_near_the_top_what_has_been_run_on_a_gpu_and_what_not():
    top = " ".join(README.split("\n## ")[0].split())
    assert "on one GPU, an H200" in top and "have not been tried" in top


def test_it_has_two_commands_with_their_times_and_names_the_environment():
    commands = re.search(r"## Two commands.*?```sh\n(.*?)```", README, re.S).group(1)
    assert re.findall(r"^make (\w+) .*about .*minutes?", commands, re.M) == ["demo", "test"]
    assert ".venv/bin/activate" in README


def test_the_python_is_short():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    body = [line for line in code.splitlines() if line.strip() and not re.match(r"import |from ", line)]
    assert len(body) <= 15


UNKNOWN_WORDS = ["seal", "slot", "the law", "are told", "changes places", "house", "the edge", "room"]


@pytest.mark.parametrize("word", UNKNOWN_WORDS)
def test_no_word_stands_there_that_only_the_code_knows(word):
    assert not re.search(rf"\b{word}s?\b", README)


@pytest.mark.parametrize("file", ["report.png", "report-dark.png"])
def test_the_picture_of_the_report_is_small_and_whole(file):
    data = (ROOT / "docs" / file).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert len(data) <= 200_000
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1000 and height >= 500
