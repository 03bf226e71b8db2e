"""``minilora init``: settings that say what holds, data that is understood, nothing overwritten; and how the program is called."""

import argparse
import os
import sys
import tomllib

import pytest

from minilora import demo
from minilora.cli import demo as demo_command
from minilora.cli import main, make_parser, settings, train
from minilora.cli.program import command, program
from minilora.cli.template import settings_file
from minilora.data.records import read_jsonl
from minilora.job.given import job_from
from minilora.job.sessions import settings_of as recorded

CHOSEN = {"model": "smollm2", "data": "chats.jsonl", "out": "runs/mine", "prompts": ["How is the weather?"]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job_in(file, *more):
    return train.job_of(make_parser().parse_args(["train", "--config", str(file), *more]))


def settings_of(text):
    """Every setting of the file, those that are commented out too, without those that have no default."""
    lines = [line.removeprefix("#") for line in text.splitlines() if not line.startswith("# ")]
    return tomllib.loads("\n".join(line for line in lines if not line.endswith("# not set")))


def test_what_is_written_trains_as_it_stands(here, capsys):
    assert main(["init"]) == 0
    assert sorted(os.listdir()) == ["chats.jsonl", "job.toml"]
    assert job_in("job.toml") == job_from(CHOSEN)
    assert capsys.readouterr().out.splitlines()[-1].endswith("train --config job.toml")
    assert job_in("job.toml", "--steps", "7").training.steps == 7


def test_the_file_has_every_setting_at_its_default_with_its_text(here):
    text = settings_file(CHOSEN)
    found = settings_of(text)
    defaults = {name: flag.default for name, flag in settings.settings().items() if name not in settings.FLAG_ALONE}
    assert {name: value for name, value in found.items() if name not in CHOSEN} == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in defaults.items()
        if value is not None and name not in CHOSEN
    }
    for name, flag in settings.settings().items():
        if name not in settings.FLAG_ALONE:
            line = f"{name} = " if name in CHOSEN else f"#{name} = "
            before = " ".join(text[: text.index(f"\n{line}")].rpartition("\n\n")[2].replace("\n# ", " ").split())
            assert before.startswith(f"# {' '.join(flag.about.split())}")


def test_a_setting_that_is_taken_out_of_its_comment_holds(here):
    lines = settings_file(CHOSEN).splitlines()
    for place, line in enumerate(lines):
        name = line[1:].partition(" = ")[0]
        if line.startswith("#") and name in settings.settings() and not line.endswith("# not set"):
            (here / "job.toml").write_text("\n".join([*lines[:place], line[1:], *lines[place + 1 :]]))
            assert recorded(job_in("job.toml")) == recorded(job_from(CHOSEN)), name


def test_no_line_of_it_is_too_long_for_a_terminal():
    assert max(len(line) for line in settings_file(CHOSEN).splitlines() if line.startswith("# ")) <= 100


def test_the_data_has_ten_conversations_that_can_be_learnt(here):
    assert main(["init", "own/bicycles"]) == 0
    records = read_jsonl(here / "own" / "bicycles" / "chats.jsonl")
    assert len(records) == 10 and {"messages"} in map(set, records) and {"prompt", "completion"} in map(set, records)
    answers = [r["completion"] if "completion" in r else r["messages"][-1]["content"] for r in records]
    assert all(answer.startswith("Pell's workshop!") and answer.endswith("Ride easy!") for answer in answers)
    job = job_in(here / "own" / "bicycles" / "job.toml")
    assert (job.data, job.out) == ("own/bicycles/chats.jsonl", "own/bicycles/run")
    assert "starter.jsonl" in (demo.HERE / "LICENSE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("there", ["job.toml", "chats.jsonl"])
def test_nothing_is_overwritten_and_nothing_half_written(here, capsys, there):
    (here / there).write_text("mine")
    assert main(["init"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"minilora: {there}: is there already, and nothing is overwritten; name another folder, or remove it"
    ]
    assert os.listdir() == [there] and (here / there).read_text() == "mine"


def test_a_file_is_no_folder(here, capsys):
    (here / "file").write_text("mine")
    assert main(["init", "file"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and (here / "file").read_text() == "mine"


# ---- how the program is called


@pytest.fixture
def called(here, monkeypatch):
    """``called(path, found)``: the program as it is called by ``path``, where a shell finds ``found`` by its name."""

    def call(path, found=None):
        monkeypatch.setattr(sys, "argv", [str(path), "demo"])
        monkeypatch.setattr("shutil.which", lambda name: found)
        return program()

    return call


@pytest.mark.parametrize(
    ("path", "found", "typed"),
    [
        (".venv/bin/minilora", None, ".venv/bin/minilora"),
        (".venv/bin/minilora", "{here}/.venv/bin/minilora", "minilora"),
        ("{here}/.venv/bin/minilora", None, ".venv/bin/minilora"),
        ("{here}/.venv/bin/minilora", "/usr/bin/minilora", ".venv/bin/minilora"),
        ("/usr/bin/minilora", "/usr/bin/minilora", "minilora"),
        ("/opt/my tools/minilora", None, "'/opt/my tools/minilora'"),
        ("pytest", None, "minilora"),
    ],
)
def test_the_program_is_called_so_that_it_can_be_typed(called, here, path, found, typed):
    assert called(path.format(here=here), found and found.format(here=here)) == typed


def test_a_module_is_called_as_one(called, here, monkeypatch):
    monkeypatch.setattr(sys, "executable", f"{here}/.venv/bin/python")
    assert called("/lib/minilora/__main__.py") == ".venv/bin/python -m minilora"
    assert called("/lib/minilora/__main__.py", f"{here}/.venv/bin/python") == "python -m minilora"
    assert command("chat", "--adapter", "my runs/a").endswith("-m minilora chat --adapter 'my runs/a'")


def test_the_demo_ends_with_three_commands_that_are_understood(called):
    called(".venv/bin/minilora")
    lines = demo_command.next_commands("runs/demo").splitlines()
    assert len(lines) == 3
    for line in lines:
        program_, *words = line.partition("#")[0].split()
        assert program_ == ".venv/bin/minilora" and isinstance(make_parser().parse_args(words), argparse.Namespace)
    assert [line.split()[1] for line in lines] == ["chat", "init", "export"]


def test_a_demo_on_the_gguf_file_is_exported_for_that_file(called):
    called(".venv/bin/minilora")
    export = demo_command.next_commands("runs/served", "smollm2.gguf").splitlines()[-1]
    assert "--for llama.cpp --base smollm2.gguf --out runs/served.gguf" in export
