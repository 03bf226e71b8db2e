"""Turns as ShareGPT and others write them, as turns with ``role`` and ``content``. Next file: ``data/shapes/understood.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minilora.data.fields import ROLES
from minilora.data.shapes.names import ANSWERS, CONTENTS, QUESTIONS, ROLES_OF, SAYERS
from minilora.errors import DataError

__all__ = ["as_turns", "parsed"]


def as_turns(value: Any, key: str) -> list[Any]:
    """The turns of a conversation: ``{"from": "human", "value"}``, ``{"user", "assistant"}``, or texts that take turns.

    Raises:
        DataError: what is none of them, with the number of the turn.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise DataError(f"{key!r} is {found}; wanted a list of turns, [{{'from': 'human', 'value': ...}}, ...]")
    if all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(value)]
    turns: list[Any] = []
    for number, turn in enumerate(value, 1):
        turns += _turn(turn, f"turn {number} of {key!r}")
    return turns


def _turn(turn: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turn, dict):
        raise DataError(
            f"{where} is a {type(turn).__name__}; wanted an object such as {{'from': 'human', 'value': ...}}"
        )
    sayer = next((name for name in SAYERS if turn.get(name) is not None), None)
    if sayer is None:
        return _exchange(turn, where)
    said = next((name for name in CONTENTS if turn.get(name) is not None), None)
    role = _role(turn[sayer], where)
    rest = {name: value for name, value in turn.items() if name not in (sayer, said) and value is not None}
    content = turn[said] if said else None
    if role == "function_call":
        return [{"role": "assistant", "content": "", "tool_calls": _calls(content, where), **rest}]
    return [{"role": role, "content": content, **rest}]


def _role(name: Any, where: str) -> str:
    role = ROLES_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(sorted({*ROLES, "human", "gpt"}))
        raise DataError(f"{where} is said by {str(name)[:40]!r}; wanted one of {known}")
    return role


def _exchange(turn: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A question and its answer in one object."""
    asked, said = ([name for name in names if turn.get(name) is not None] for names in (QUESTIONS, ANSWERS))
    if len(asked) != 1 or len(said) != 1:
        raise DataError(
            f"{where} has the keys {str(sorted(turn))[:100]}; wanted 'role' and 'content', 'from' and 'value', or a question and its answer"
        )
    return [{"role": "user", "content": turn[asked[0]]}, {"role": "assistant", "content": turn[said[0]]}]


def _calls(content: Any, where: str) -> list[Any]:
    """Calls of tools that were given as text: an object with name and arguments, or a list of them."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        raise DataError(f"{where} is no call in JSON; wanted {{'name': ..., 'arguments': {{...}}}}") from None
    return [{"type": "function", "function": call} for call in (found if isinstance(found, list) else [found])]


def parsed(value: Any, key: str) -> Any:
    """A list that stands as its text in JSON, as it must in a cell of CSV; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{key!r} begins as a list, and is not JSON ({str(error)[:100]}); write it as JSON") from None
