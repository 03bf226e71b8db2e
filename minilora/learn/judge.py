"""Whether a reader's input shows a mutant: original and mutant are called with copies of it, and must not do the same.

Compared is what they return, or the error, and what they leave of their arguments. Next file: ``learn/apart.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isgenerator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from minilora.learn.answer import RIGHT, UNWRITTEN, WRONG, Grade, Unusable
from minilora.learn.case import raised
from minilora.learn.grade import function_of, load
from minilora.learn.mutants import mutant
from minilora.learn.shown import difference, shown

__all__ = ["judge", "judged"]

_ITEMS = 8  # of a generator, which need not end


def judge(path: Path, number: int) -> Grade:
    """The grade of ``show`` in a reader's file."""
    try:
        return judged(load(path), number, path)
    except Unusable as error:
        return Grade("show", WRONG, str(error))


def judged(names: dict[str, Any], number: int, path: Path | None = None) -> Grade:
    """The grade of ``show`` among ``names``. Raises ``Unusable`` where there is none."""
    show = function_of(names, "show", [])
    try:
        with torch.no_grad():  # what depends on a gradient cannot be copied
            arguments = show()
    except NotImplementedError:
        return Grade("show", UNWRITTEN)
    except (Exception, SystemExit) as error:
        return Grade("show", WRONG, raised(error, path))
    if not isinstance(arguments, tuple):
        return Grade(
            "show", WRONG, f"returns {shown(arguments)}; wanted a tuple of arguments, with a comma if it is one"
        )
    broken = mutant(number)
    before = _outcome(broken.original(), arguments)
    if before.error is not None:
        return Grade("show", WRONG, f"the original does not take {shown(arguments)}: it {raised(before.error)}")
    after = _outcome(broken.broken(), arguments)
    if after.error is not None:
        return Grade("show", RIGHT, f"the mutant {raised(after.error)}; the original returns {shown(before.value)}")
    found = difference(after.value, before.value) or difference(after.left, before.left)
    if found is None:
        return Grade("show", WRONG, f"original and mutant agree on it: both return {shown(before.value)}")
    return Grade("show", RIGHT, f"the mutant against the original: {found}")


@dataclass(frozen=True)
class _Outcome:
    """What a call did: its value and what is left of its arguments, or its error."""

    value: Any = None
    left: tuple[Any, ...] = ()
    error: Exception | None = None


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Outcome:
    own = copy.deepcopy(arguments)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            value = function(*own)
            value = list(islice(value, _ITEMS)) if isgenerator(value) else value
        except Exception as error:
            return _Outcome(error=error)
    return _Outcome(copy.deepcopy(value), own)  # a value may lie in a buffer that the next call uses again
