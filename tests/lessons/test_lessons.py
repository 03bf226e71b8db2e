"""Every lesson runs to its end by itself, offline, within its minute; and the one file does what the demo does."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora.learn.course import LESSONS as COURSE

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "lessons").glob("[01]*.py"))
PARTS = ("**The question.**", "## What would break if", "## Exercises")
MOST = 60  # seconds


def run(*command, **env):
    """What a script says, and its seconds; on one thread, for another test has the other core."""
    began = time.monotonic()
    settings = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **settings, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, time.monotonic() - began


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_its_parts(path):
    text = path.read_text(encoding="utf-8")
    assert all(part in text for part in PARTS) and "plt." in text and "$$" in text
    assert re.search(rf"^# # {int(path.stem[:2])} · ", text, re.M)
    assert text.count("minilora learn") >= 2


def test_the_command_and_the_page_know_every_lesson():
    course = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
    assert [f"lessons/{path.stem}" for path in LESSONS] == [lesson.page for lesson in COURSE] and len(LESSONS) == 12
    for path, lesson in zip(LESSONS, COURSE, strict=True):
        title = re.search(r"^# # \d+ · (.*)$", path.read_text(encoding="utf-8"), re.M)[1]
        assert title == lesson.title and f"| [{lesson.number} · {title}](lessons/{path.name}) |" in course


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_opens_as_a_notebook(path):
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == kinds[-1] == "markdown" and kinds.count("code") >= 4
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.lesson
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs(path):
    said, seconds = run(path)
    assert said and seconds < 2 * MOST  # of two processes, each has one of two cores


@pytest.mark.lesson
def test_the_one_file_finds_the_keepers_voice(tmp_path):
    from minilora.demo import DATA, prompts
    from minilora.hf.smollm2 import smollm2_folder

    said, _ = run(ROOT / "lessons" / "nano.py", smollm2_folder(), DATA, tmp_path / "adapter")
    assert prompts()[0] in said and "after: By the lamp," in said and "before: By the lamp," not in said
