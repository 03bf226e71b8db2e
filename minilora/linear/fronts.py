"""Fronts: a class put before a module's own, so that it does one thing more and stays what it is for everybody else.

``isinstance``, the class's name, its parameters and its place in the model do not change. Copies and pickles find the original class
by its name and put the fronts before it again. Next file: ``linear/layers.py``.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

__all__ = ["Front", "extended", "is_on_top", "put_in_front", "take_from_front"]


class Front(nn.Module):
    """Base of the classes that are put before others."""

    def __reduce__(self) -> tuple:
        fronts, kind = [], type(self)
        while "_extends" in kind.__dict__:
            front, kind = kind.__dict__["_extends"]
            fronts.append(front)
        return revive, (tuple(fronts), kind), self.__dict__


@functools.cache
def extended(front: Any, old: Any) -> Any:
    """``old`` with ``front`` before it, under the old name, by which modules are looked up; the same class each time."""
    own = {"__module__": old.__module__, "__doc__": old.__doc__, "_extends": (front, old)}
    if hasattr(front, "forward_of"):  # a forward that does one thing more, and has the signature of this class's
        own["forward"] = front.forward_of(old)
    return type(old.__name__, (front, old), own)


def revive(fronts: tuple, kind: Any) -> Any:
    """An empty object of the extended class, for copies and pickles to fill."""
    for front in reversed(fronts):
        kind = extended(front, kind)
    return kind.__new__(kind)


def put_in_front(module: nn.Module, front: type[Front]) -> None:
    """Put ``front`` before the module's class; once."""
    if not isinstance(module, front):
        kind: Any = type(module)
        module.__class__ = extended(front, kind)  # type: ignore[arg-type]


def is_on_top(front: type[Front], module: nn.Module) -> bool:
    """Whether an object's class is still the one that ``front`` was put before, and nobody has extended it since."""
    return "_extends" in type(module).__dict__ and issubclass(type(module).__dict__["_extends"][0], front)


def take_from_front(module: nn.Module, *fronts: type[Front]) -> None:
    """Undo ``put_in_front`` for these; where somebody has extended the class since then, it stays as it is."""
    kind: Any = type(module)
    others = []
    while "_extends" in vars(kind):
        front, kind = vars(kind)["_extends"]
        if not issubclass(front, fronts):
            others.append(front)
    for front in reversed(others):
        kind = extended(front, kind)
    if kind is not type(module):
        module.__class__ = kind
