"""For each lesson the cases of its exercises, small and telling ones first: ``EXERCISES``, in the order of the reader's file.

What is wanted comes from minilora's own functions, or from a law that holds for every right answer, never from the solutions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from minilora.learn.case import Exercise

__all__ = ["exercises"]


def exercises(number: int) -> Sequence[Exercise]:
    """The exercises of a lesson, with their cases."""
    found: Sequence[Exercise] = importlib.import_module(f"{__name__}.lesson_{number:02}").EXERCISES
    return found
