"""What ``--help`` says: every flag of every command has a group, a text, a unit where it is a number, and its true default."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import minilora
from minilora.cli import COMMANDS, main, make_parser, sweep, train
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.kinds import GATHERED, Numbers, NumbersOrTable, Table
from minilora.cli.parser import Parser
from minilora.cli.settings import LORA_FLAGS, NO_FLAGS, settings
from minilora.cli.trial import settings_of
from minilora.hf.trials import BenchJob, PlanJob
from minilora.job.settings import Job
from minilora.lora.config import LoraConfig
from minilora.training.settings import TrainConfig

ROOT = Path(minilora.__file__).parents[1]
FOLDERS_ALONE = {
    "init",
    "info",
    "doctor",
    "compare",
    "push",
    "learn",
    "verify",
}  # commands that load no model: what they take is folders
GROUPS = [
    "positional arguments",
    "options",
    "model",
    "data",
    "adapter",
    "training",
    "evaluation",
    "speed and memory",
    "generation",
    "output",
]
UNITS = (
    "tokens", "examples", "optimizer steps", "micro-batches", "checkpoints", "runs", "threads", "weights", "rank", "norm",
    "share", "probability", "number",
)  # fmt: skip
FROM_A_RUN = re.compile(r"default: as the run of (?:--adapter|FOLDER) was (trained|asked)(, else [^ ]+)?\)$")
NO_VALUE = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)


def command(name):
    return make_parser().commands[name].load()


def flags_of(parser):
    return [action for action in parser._actions if not isinstance(action, NO_VALUE)]


def shown(value):
    """A default as the help writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(value) or "none"
    return "none" if value in (None, {}) else str(value) or '""'


def faults(action, default):
    """What the help of a flag lacks."""
    text = action.help or ""
    if len(text.split()) < 3 or not text[0].isalpha():
        yield "no text"
    if action.type in (int, float) and not any(unit in text for unit in UNITS):
        yield "no unit"
    if action.dest == "init_lora_weights":  # a word, which may be a switch
        default = str(default).lower()
    ending = "required)" if default is argparse.SUPPRESS else f"default: {shown(default)})"
    remembered = default in (None, []) and FROM_A_RUN.search(text)
    if not text.endswith(ending) and not remembered:
        yield f"does not end in {ending!r}"


def true_default(name, action):
    """What holds if the flag is not given; SUPPRESS if it must be."""
    own = {flag.name: flag.default for flag in sweep.OWN} if name == "sweep" else {}
    if action.dest in own:
        return own[action.dest]
    if name in ("train", "sweep") and action.dest not in ("config", "debug", "plugin"):
        if action.dest in ("model", "data", "out"):
            return argparse.SUPPRESS
        job = train.job_of(make_parser().parse_args(["train", "--model", "m", "--data", "d", "--out", "o"]))
        holder = next(part for part in (job, job.training, job.lora) if hasattr(part, action.dest))
        return getattr(holder, action.dest)
    return argparse.SUPPRESS if action.required else action.default


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_text_a_unit_and_its_default(name):
    found = {
        action.dest: problems
        for action in flags_of(command(name))
        if (problems := list(faults(action, true_default(name, action))))
    }
    assert found == {}


def test_what_is_tried_without_a_flag_is_the_default_of_its_dataclass():
    plan, bench = make_parser().parse_args(["plan"]), make_parser().parse_args(["bench"])
    assert PlanJob(**settings_of(plan), lora_dropout=plan.lora_dropout) == PlanJob("smollm2")
    own = {name: getattr(bench, name) for name in ("steps", "repeats", "lr", "seed", "data")}
    assert BenchJob(**settings_of(bench), **own) == BenchJob("smollm2")


@pytest.mark.parametrize(
    ("options", "default", "fault"),
    [
        ({"type": int, "help": "examples of a batch (default: 4)"}, 5, "does not end in 'default: 5)'"),
        ({"type": int, "help": "how many there are (default: 4)"}, 4, "no unit"),
        ({"help": "(default: 4)"}, 4, "no text"),
        ({}, 4, "no text"),
        ({"help": "a folder for the model (default: none)"}, argparse.SUPPRESS, "does not end in 'required)'"),
    ],
)
def test_a_flag_that_lacks_something_is_seen(options, default, fault):
    action = argparse.ArgumentParser().add_argument("--x", **options)
    assert fault in list(faults(action, default))


# Flags whose value is words, or the name of something in words; all others say of what kind it is.
WORDS = {"--system", "--prompts", "--grid"}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_stands_for_a_value_says_what_it_is(name):
    shown = {
        action.option_strings[0]: action.metavar
        for action in flags_of(command(name))
        if action.option_strings and action.metavar
    }
    assert {flag for flag, text in shown.items() if text == "TEXT"} <= WORDS
    known = {
        "--server": "URL",
        "--base": "FILE",
        "--lora": "FILE",
        "--key-variable": "VARIABLE",
        "--in": "PROGRAM",
        "--for": "PROGRAM",
    }
    assert all(known.get(flag, text) == text for flag, text in shown.items())
    if name in ("merge", "export"):
        assert shown["--out"] == "PATH"


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_stand_in_groups(name):
    parser = command(name)
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert titles == sorted(titles, key=GROUPS.index)
    assert {"model", "training"} & set(titles) or name in FOLDERS_ALONE
    (options,) = [group for group in parser._action_groups if group.title == "options"]
    assert {action.dest for action in options._group_actions} <= {"help", "debug", "config", "plugin"}


def test_commands_that_write_have_a_group_for_it():
    for name in set(COMMANDS) - {"generate", "chat", "init", "seal"}:
        assert "output" in [group.title for group in command(name)._action_groups]


def help_of(*words, columns="80"):
    text, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = columns
    try:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as caught:
            main(list(words))
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    assert caught.value.code == 0
    return text.getvalue()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_help_is_readable(name):
    text = help_of(*filter(None, [name]), "--help")
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith(f"usage: minilora {name}".rstrip()) and usage.count("\n") == 0 and len(usage) < 100
    body = rest.partition("\nexamples:\n")[0]
    assert all(len(line) <= 80 for line in body.splitlines())
    words = " ".join(body.split()).replace("in Python also None", "")
    assert "``" not in text and "None" not in words and "%" not in text
    assert not re.search(r"all-\n", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_names_what_is_required(name):
    parser = command(name)
    for action in flags_of(parser):
        if true_default(name, action) is argparse.SUPPRESS and action.option_strings:
            assert action.option_strings[0] in parser.usage


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_understood(name):
    parser = command(name)
    examples = [shlex.split(line) for line in parser.epilog.splitlines()[1:]]
    assert len(examples) >= (3 if name == "train" else 2)
    for program, *words in examples:
        assert program == "minilora" and words[0] == name
        parsed = make_parser().parse_args(words)
        if name in ("train", "sweep") and not parsed.config:
            assert isinstance((train if name == "train" else sweep).job_of(parsed), Job)


@pytest.mark.parametrize("words", [["help"], ["help", "train"]])
def test_help_may_be_asked_for_as_a_command(words):
    assert help_of(*words) == help_of(*words[1:], "--help")


def test_the_list_of_commands_says_what_each_does():
    text = help_of("--help", columns="120")
    for name, about in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(about)}$", text, re.M)


# ---- flags from dataclasses


def test_a_sweep_has_every_flag_of_a_job_or_refuses_it_with_a_reason():
    known = {action.dest for action in flags_of(command("sweep"))}
    assert set(settings()) == (known & set(settings())) | set(sweep.REFUSED) and not known & set(sweep.REFUSED)
    assert set(sweep.TEXTS) <= known & set(settings())


def test_the_texts_of_a_config_are_those_of_its_docstring():
    flags = fields_of(TrainConfig)
    assert flags["batch_size"].help == "examples of a micro-batch, packed or not (default: 4)"
    assert flags["gradient_checkpointing"].help.startswith("recompute activations in the backward pass: less memory")
    assert fields_of(Job)["model"].help == 'hub id, local folder, GGUF file, or "smollm2" (required)'
    assert "lora" not in fields_of(Job) and "training" not in fields_of(Job)


def test_a_field_that_a_text_names_becomes_a_flag():
    assert "--use-rslora" in fields_of(LoraConfig)["lora_alpha"].about
    assert "--out" in fields_of(Job)["resume"].about


@dataclasses.dataclass
class Base:
    """What is below.

    Args:
        one, two: a text that goes on
            in the next line, 50%.

    Raises:
        three: no field.
    """

    one: int = 1
    two: tuple[str, ...] = ("a", "b")
    three: bool = False


@dataclasses.dataclass
class Child(Base):
    """What is on top.

    Args:
        four: a float.
        two: another text.
    """

    four: float | None = None


def test_a_docstring_is_read_with_those_under_it():
    flags = fields_of(Child, three=True)
    assert {name: (flag.kind, flag.help) for name, flag in flags.items()} == {
        "one": (int, "a text that goes on in the next line, 50%% (default: 1)"),
        "two": (list, "another text (default: a b)"),
        "three": (bool, " (default: on)"),
        "four": (float, "a float (default: none)"),
    }


def test_every_field_of_an_adapter_is_a_flag_or_named_with_a_reason():
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(LORA_FLAGS) == names - set(NO_FLAGS) and set(NO_FLAGS) <= names
    assert all(len(reason.split()) >= 3 for reason in NO_FLAGS.values())
    assert set(LORA_FLAGS) <= set(settings())
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= set(settings())


@dataclasses.dataclass
class Newer(LoraConfig):
    """What is newer.

    Args:
        sizes: sizes of it.
    """

    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def test_a_field_that_is_added_is_a_flag_by_itself():
    assert fields_of(Newer)["sizes"].kind is Table and fields_of(Newer)["sizes"].about.startswith("sizes of it")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["q_proj=4", "layers.0.*=8"], {"q_proj": 4, "layers.0.*": 8}),
        (["a(?=b)=2"], {"a(?=b)": 2}),  # a regular expression may hold the sign itself
        (["cache_file=/a=b", "verbose=true", "x=1e-3"], {"cache_file": "/a=b", "verbose": True, "x": 1e-3}),
    ],
)
def test_a_table_can_be_typed(words, value):
    assert GATHERED[Table](words) == value


@pytest.mark.parametrize("words", [["q_proj"], ["=4"], ["q_proj="], ["a=1", "a=2"]])
def test_what_is_no_table_is_refused(words):
    with pytest.raises(ValueError, match=r"wanted (one such as q_proj=4|each name once)"):
        GATHERED[Table](words)


def test_numbers_and_tables_of_numbers():
    assert GATHERED[NumbersOrTable](["5", "6"]) == [5, 6] == GATHERED[Numbers](["5", "6"])
    assert GATHERED[NumbersOrTable](["embed_tokens=5,6", "other=7"]) == {"embed_tokens": [5, 6], "other": [7]}
    for kind in (Numbers, NumbersOrTable):
        with pytest.raises(ValueError, match="'x' is no whole number"):
            GATHERED[kind](["x"])
    with pytest.raises(ValueError, match="given twice"):
        GATHERED[NumbersOrTable](["a=1", "a=2"])


def test_flags_may_be_left_unset():
    parser = Parser("p", "Does it.")
    add_flags(parser, "model", fields_of(Job, ("model", "double_quant")).values(), unset=True)
    add_flags(parser, "model", [Flag("count", int, 3, "a number")])
    assert vars(parser.parse_args([])) == {"debug": False, "model": None, "double_quant": None, "count": 3}
    given = vars(parser.parse_args(["--no-double-quant", "--model", "m", "--count", "4"]))
    assert given == {"debug": False, "model": "m", "double_quant": False, "count": 4}
    assert [group.title for group in parser._action_groups].count("model") == 1


def test_without_docstrings_the_commands_work():
    """``python -OO`` drops the texts with all docstrings, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "minilora", "train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and not done.stderr and "(default: 60)" in done.stdout
