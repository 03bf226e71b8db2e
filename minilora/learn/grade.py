"""A reader's file graded in this process: each function against its cases, and an answer of one sentence for whatever is wrong.

    lesson_05.py --(load)--> functions --(cases of graders/lesson_05.py, the first that fails)--> Grade

The command runs this in a process of its own, which may be ended: ``apart.py``. Next file: ``learn/shown.py``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minilora.learn.answer import RIGHT, UNWRITTEN, WRONG, Grade, Unusable
from minilora.learn.case import Exercise, failure, raised
from minilora.learn.course import Lesson, lesson
from minilora.learn.graders import exercises
from minilora.learn.shown import kind_of

__all__ = ["function_of", "grades", "load"]


def grades(
    path: Path, number: int, first: int = 0, began: Callable[[str], None] = lambda name: None
) -> Iterator[Grade]:
    """The grade of each exercise of a lesson from ``first`` on, for the reader's file. ``began`` is told each name beforehand."""
    asked = lesson(number)
    began(path.name)
    try:
        names = load(path)
    except Unusable as error:
        yield Grade(path.name, WRONG, str(error))
        return
    for exercise in exercises(number)[first:]:
        began(exercise.name)
        yield _grade(exercise, names, asked, path)


def _grade(exercise: Exercise, names: dict[str, Any], asked: Lesson, path: Path) -> Grade:
    wanted = _parameters(asked, exercise.name)
    try:
        function = function_of(names, exercise.name, wanted)
        why = next(
            (found for case in exercise.cases() if (found := failure(function, case, wanted, path)) is not None), ""
        )
    except NotImplementedError:
        return Grade(exercise.name, UNWRITTEN)
    except Unusable as error:
        why = str(error)
    return Grade(exercise.name, WRONG if why else RIGHT, why)


def load(path: Path) -> dict[str, Any]:
    """What a reader's file defines. Raises ``Unusable``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"cannot be read ({error})") from None
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        code = compile(text, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        raise Unusable(f"{line}is no Python ({getattr(error, 'msg', error)})") from None
    try:
        exec(code, names)
    except (Exception, SystemExit) as error:
        raise Unusable(raised(error, path)) from None
    return names


def function_of(names: dict[str, Any], name: str, parameters: list[str]) -> Callable[..., Any]:
    """A function that takes as many values as there are ``parameters``. Raises ``Unusable``."""
    if name not in names:
        raise Unusable(f"there is no function {name} in the file; wanted def {name}({', '.join(parameters)})")
    function = names[name]
    if not inspect.isfunction(function):
        raise Unusable(f"{name} is {kind_of(function)}; wanted def {name}({', '.join(parameters)})")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError:
        taken = ", ".join(inspect.signature(function).parameters)
        raise Unusable(f"{name} takes ({taken}); wanted ({', '.join(parameters)})") from None
    return function


def _parameters(asked: Lesson, name: str) -> list[str]:
    """The names of what an exercise's function takes, from the file that the reader got."""
    (node,) = (
        node for node in ast.parse(asked.exercise).body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return [argument.arg for argument in node.args.args]
