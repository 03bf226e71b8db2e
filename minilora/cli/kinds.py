"""Values of flags that are no plain number or text: whole numbers, a word that may be a switch, and tables of ``NAME=VALUE``.

In a TOML file they are a list, text or a switch, and a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["EXAMPLES", "GATHERED", "Gather", "Numbers", "NumbersOrTable", "Table", "Word", "fits", "word"]


class Numbers(list[int]):
    """Several whole numbers, as ``1 2 3``."""


class Table(dict[str, Any]):
    """Names with a value each, as ``q_proj=4 'layers.0.*=8'``."""


class NumbersOrTable(Table):
    """``1 2 3``, or lists of them by name: ``embed_tokens=1,2,3``."""


class Word(str):
    """A word, or "true" or "false"."""


class Gather(argparse.Action):
    """Makes one value of the words of a flag, by ``GATHERED``."""

    def __init__(self, *more: Any, kind: type, **options: Any) -> None:
        super().__init__(*more, **options)
        self.read = GATHERED[kind]

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, self.read(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def word(text: str) -> bool | str:
    """True and False where the word says so."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _numbers(words: Sequence[str]) -> list[int]:
    return [_whole(one) for one in words]


def _table(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in words:
        name, value = _cut(one)
        if name in found:
            raise ValueError(f"{name[:100]!r} is given twice; wanted each name once")
        found[name] = _value(value)
    return found


def _cut(text: str) -> tuple[str, str]:
    """Name and value. A name may be a regular expression with '=' in it, and a value the path of a file with one."""
    name, equals, value = text.partition("=")
    if not name.isidentifier():
        name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise ValueError(f"{text[:100]!r} is no NAME=VALUE; wanted one such as q_proj=4")
    return name, value


def _numbers_or_table(words: Sequence[str]) -> Any:
    if not any("=" in one for one in words):
        return _numbers(words)
    cut = [_cut(one) for one in words]
    return _table([f"{name}=0" for name, _ in cut]) | {name: _numbers(value.split(",")) for name, value in cut}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return word(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:100]!r} is no whole number; wanted one such as 8") from None


# What stands for a value of each kind in a settings file, where there is none by default.
EXAMPLES: dict[type, Any] = {
    bool: True,
    int: 1,
    float: 0.1,
    str: "...",
    list: ["..."],
    Numbers: [1, 2],
    Table: {},
    NumbersOrTable: [1, 2],
    Word: "true",
}
# How the words of a flag become its value.
GATHERED: dict[type, Callable[[Sequence[str]], Any]] = {
    Numbers: _numbers,
    Table: _table,
    NumbersOrTable: _numbers_or_table,
}


def fits(value: Any, kind: type) -> str:
    """Whether a value of TOML is of one of these kinds: "", or what was wanted."""
    whole = isinstance(value, list) and all(type(one) is int for one in value)
    if kind is Word:
        return "" if isinstance(value, (str, bool)) else "text, true or false"
    if kind is Numbers:
        return "" if whole or type(value) is int else "whole numbers, such as [1, 2]"
    table = isinstance(value, dict)
    if kind is NumbersOrTable:
        return "" if whole or table else "whole numbers, such as [1, 2], or a table of them"
    return "" if table else "a table, such as {q_proj = 4}"
