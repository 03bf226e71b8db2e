"""Twenty mutants: each is of a function as it is now, is shown by its witness, and not by an input that is nothing special."""

import ast
import re

import pytest
import torch

from minilora.errors import ConfigError, StateError
from minilora.learn.answer import RIGHT, UNWRITTEN, WRONG
from minilora.learn.judge import judge
from minilora.learn.mutant import Mutant
from minilora.learn.mutants import MUTANTS, mutant

NUMBERS = range(1, len(MUTANTS) + 1)


def judged(tmp_path, number, text):
    (tmp_path / "mutant.py").write_text(text, encoding="utf-8")
    return judge(tmp_path / "mutant.py", number)


def test_there_are_twenty_of_as_many_functions():
    assert len(MUTANTS) == 20 == len({each.place for each in MUTANTS})
    with pytest.raises(ConfigError, match="mutant 21: is not there; wanted 1 to 20"):
        mutant(21)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_witness_shows_it(tmp_path, number):
    grade = judged(tmp_path, number, mutant(number).witness)
    assert grade.state == RIGHT and "the original" in grade.why, grade


@pytest.mark.parametrize("number", NUMBERS)
def test_a_plain_input_does_not(tmp_path, number):
    grade = judged(tmp_path, number, mutant(number).plain)
    assert grade.state == WRONG and grade.why.startswith("original and mutant agree on it: both return "), grade


@pytest.mark.parametrize("number", NUMBERS)
def test_the_file_shows_the_mutant_and_not_the_change(tmp_path, number):
    each = mutant(number)
    text = each.exercise(number)
    ast.parse(text)
    assert each.new in text and each.old not in each.source().replace(each.new, "")
    assert all(line.startswith(("#", " ")) or not line for line in text.partition("import torch")[2].splitlines()[3:-4])
    assert judged(tmp_path, number, text).state == UNWRITTEN


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1]", r"returns \[1\]; wanted a tuple"),
        ("return 1 / 0", "raises ZeroDivisionError: division by zero, line 2 of mutant.py"),
        ("exit()", r"ends Python \(SystemExit, line 2 of mutant.py\)"),
        ("return 'a', 5", r"the original does not take \('a', 5\): it raises TypeError"),
        ("return ('a',)", r"the original does not take \('a'\): it raises TypeError"),
        ("return 'q', 'k'", "original and mutant agree on it: both return False"),
    ],
)
def test_an_input_that_shows_nothing_is_told_why(tmp_path, body, said):
    grade = judged(tmp_path, 1, f"def show():\n    {body}\n")
    assert grade.state == WRONG and re.match(said, grade.why), grade


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def show(x):\n    return x\n", "show takes (x); wanted ()"),
        ("show = 3\n", "show is an int; wanted def show()"),
        ("", "there is no function show in the file; wanted def show()"),
        ("def show(:\n", "line 1: is no Python (invalid syntax)"),
    ],
)
def test_a_file_without_the_function_is_told(tmp_path, text, said):
    assert judged(tmp_path, 1, text).why == said


@pytest.mark.parametrize("number", NUMBERS)
def test_the_file_says_how_to_make_what_the_function_takes(tmp_path, number):
    """Where the arguments are objects of minilora, lines that make one stand in the file; what they make is no answer of its own."""
    each = mutant(number)
    made, shown = {"torch": torch}, {}
    exec(each.makes, made)
    exec(each.witness, shown)
    for argument in shown["show"]():
        for value in argument if isinstance(argument, list) else [argument]:
            if type(value).__module__.startswith("minilora"):
                assert any(type(one) is type(value) for one in made.values())
    text = each.exercise(number)
    assert all(f"\n# {line}\n" in text for line in each.makes.splitlines())
    ready = [name for name in ("layer", "example", "settings", "patterns") if name in made]
    for name in ready:
        assert (
            judged(tmp_path, number, f"import torch\n{each.makes}\ndef show():\n    return ({name},)\n").state == WRONG
        )


def test_code_that_has_moved_on_is_named():
    moved = Mutant("quant.lookup:pack", "It packs.", "no such text", "x", "", "")
    with pytest.raises(StateError, match=r"quant.lookup:pack: 0 places say 'no such text'"):
        moved.source()


def test_what_is_left_of_the_arguments_counts(tmp_path, monkeypatch):
    """``reset`` returns None, whatever it does to its layer."""
    resets = Mutant(
        "lora.layer:LoRALinear.reset",
        "It resets.",
        "self.lora_B.zero_()",
        "self.lora_A.zero_()",
        witness=mutant(2).witness,
        plain="",
    )
    monkeypatch.setattr("minilora.learn.judge.mutant", lambda number: resets)
    grade = judged(tmp_path, 1, resets.witness)
    assert grade.state == RIGHT and "lora_" in grade.why
