"""Which keys of ``rank_pattern`` and ``alpha_pattern`` mean a path, found without trying every key on every path.

PEFT's rule: a key is a regular expression that must match the end of the path, from its start or from behind a dot, and of several keys
the first wins. Nearly all keys are names ("layers.3.q_proj"), in which only the dot is special: it stands for any one sign. Such a key is
found by its length and the places of its dots in a table. What is left, true expressions, is compiled once and tried in turn.
Next file: ``lora/config.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from minilora.files.validate import PLAIN

__all__ = ["Patterns"]


class Patterns:
    """The keys of one pattern, in their order."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)
        # Length of a name -> where its dots are -> the name -> its number among the keys.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for number, key in enumerate(self.keys):
            if PLAIN.fullmatch(key):
                dots = tuple(place for place, sign in enumerate(key) if sign == ".")
                self._names.setdefault(len(key), {}).setdefault(dots, {})[key] = number
            else:
                self._expressions.append((number, re.compile(rf"(.*\.)?({key})$")))

    def first(self, path: str) -> str | None:
        """The first key that means ``path``; None if none does."""
        found = min(self._named(path), default=len(self.keys))
        for number, expression in self._expressions:
            if number > found:
                break
            if expression.match(path):
                return self.keys[number]
        return self.keys[found] if found < len(self.keys) else None

    def all(self, path: str) -> list[str]:
        """Every key that means ``path``, in their order."""
        found = {number for number, expression in self._expressions if expression.match(path)}
        return [self.keys[number] for number in sorted({*found, *self._named(path)})]

    def _named(self, path: str) -> Iterator[int]:
        """Numbers of the names that mean ``path``."""
        start = 0
        while True:
            end = path[start:]
            for dots, names in self._names.get(len(end), {}).items():
                masked = list(end)
                for place in dots:
                    masked[place] = "."
                if (number := names.get("".join(masked))) is not None:
                    yield number
            start = path.find(".", start) + 1
            if not start:
                return
