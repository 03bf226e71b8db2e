"""What a grader answers. Nothing here needs torch. Next file: ``learn/grade.py``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RIGHT", "UNWRITTEN", "WRONG", "Grade", "Unusable"]

RIGHT, WRONG, UNWRITTEN = "right", "wrong", "not written yet"


@dataclass(frozen=True)
class Grade:
    """What came of one function: ``state`` is RIGHT, WRONG or UNWRITTEN, and ``why`` a sentence."""

    name: str
    state: str
    why: str = ""


class Unusable(Exception):
    """A reader's file, or a function of it, that cannot be called; the message says why in a sentence."""
