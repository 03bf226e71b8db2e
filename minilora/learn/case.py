"""A case of an exercise: what goes in, what must come out, and the sentence that says how a reader's function fails it.

The sentence has the input that shows it, what was got and what was wanted; how to come there is the reader's work.
Next file: ``learn/graders/lesson_01.py``.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.learn.shown import difference, kind_of, shown

__all__ = ["CLOSE", "Case", "Exercise", "Raises", "drawn", "failure", "raised"]

CLOSE = 1e-5  # what the order of a sum may change in fp32, as a share of the largest value


@dataclass(frozen=True)
class Raises:
    """Wanted instead of a value: an error of this kind."""

    kind: type[Exception]


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        arguments: what the function is called with, by position; it must not change them.
        wanted: what it must return, or ``Raises``. Not looked at where there is a ``law``.
        law: gets what the function returned and the arguments that it was called with; says what is wrong, or None.
        close: as ``difference``. said: the input in words, where the arguments themselves say too little.
        parts: names of the values of a tuple that is wanted. asks: gets the function itself and the arguments, for what one value does
            not show; says what is wrong, or None.
    """

    arguments: tuple[Any, ...]
    wanted: Any = None
    law: Callable[..., str | None] | None = None
    close: float = CLOSE
    said: str = ""
    parts: tuple[str, ...] = ()
    asks: Callable[..., str | None] | None = None


@dataclass(frozen=True)
class Exercise:
    """A function that the reader writes, and the cases that it must pass, in this order."""

    name: str
    cases: Callable[[], Iterator[Case]]


def failure(function: Callable[..., Any], case: Case, parameters: list[str], file: Path | None = None) -> str | None:
    """What a function does wrong in a case, as a sentence; None if nothing.

    Args:
        parameters: names of what it takes, for the sentence. file: where the function stands, to name the line of an error.

    Raises:
        NotImplementedError: the function is not written yet.
    """
    arguments, before = copy.deepcopy(case.arguments), copy.deepcopy(case.arguments)
    told = case.said or ", ".join(
        f"{name}={shown(value)}" for name, value in zip(parameters, case.arguments, strict=True)
    )
    found: str | None
    torch.manual_seed(0)
    try:
        got = function(*arguments)
        asked = case.asks(function, *copy.deepcopy(case.arguments)) if case.asks else None
    except NotImplementedError:
        raise
    except (Exception, SystemExit) as error:
        wanted = isinstance(case.wanted, Raises) and isinstance(error, case.wanted.kind)
        found = None if wanted else raised(error, file)
    else:
        found = _judged(got, arguments, case) or _changed(arguments, before, parameters) or asked
    return f"{function.__name__}({told}): {found}" if found else None


def _judged(got: Any, arguments: tuple[Any, ...], case: Case) -> str | None:
    if isinstance(case.wanted, Raises):
        return f"got {shown(got)}, wanted {kind_of(case.wanted.kind)}"
    if got is None and (case.law is not None or case.wanted is not None):
        return "returned nothing (is there a return?)"
    if case.law is None:
        return _parts(got, case) or difference(got, case.wanted, case.close)
    try:
        return case.law(got, *arguments)
    except Exception as error:  # what came back has not even the form of an answer
        return f"got {shown(got)}, which cannot be judged ({type(error).__name__}: {_line(error)})"


def _parts(got: Any, case: Case) -> str | None:
    """What is wrong with the first value that is wrong, by its name."""
    if not case.parts or not isinstance(got, (list, tuple)) or len(got) != len(case.parts):
        return None
    found = (difference(one, wanted, case.close) for one, wanted in zip(got, case.wanted, strict=True))
    return next((f"{name}: {each}" for name, each in zip(case.parts, found, strict=True) if each), None)


def _changed(arguments: tuple[Any, ...], before: tuple[Any, ...], parameters: list[str]) -> str | None:
    """An argument that is no longer what it was."""
    for name, now, then in zip(parameters, arguments, before, strict=True):
        if isinstance(then, (Tensor, list, dict)) and difference(now, then):
            return f"{name} is changed by the call; it was {shown(then)} and is {shown(now)}: work on a copy"
    return None


def raised(error: BaseException, file: Path | None = None) -> str:
    """An error of the reader's code in one sentence, with its line where that is in ``file``."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == str(file)
    ]
    where = f", line {lines[-1]} of {file.name}" if lines and file else ""
    if isinstance(error, SystemExit):
        return f"ends Python (SystemExit{where}); wanted a value"
    return f"raises {type(error).__name__}{': ' * bool(str(error))}{_line(error)}{where}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def drawn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Normal tensors of these shapes; the same seed gives the same."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
