"""Whether a chat template uses what a conversation says: what it passes over would be learnt without, and is refused by name.

A name is looked for in the template's source, a text in what was rendered; where it does not stand there as it was given, the text is
changed, and must change the rendering. Next file: ``data/chat/layout.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilora.data.chat.template import Template
from minilora.data.fields import Conversation
from minilora.errors import DataError

__all__ = ["check_answer", "check_used"]

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # transformers gives a template each under the others' names too
_OWN = {"role", "content", "tool_calls"}
_LINKS = {"id", "tool_call_id"}  # which call a tool answers; the order says it too
_known: set[tuple[Any, ...]] = set()  # kinds of turns that were seen to have an effect


def check_used(talk: Conversation, template: Template, whole: str) -> None:
    """Raise ``DataError`` for an option, a field of a turn, a turn or a tool call that has no part in ``whole``, the rendered text."""
    for name in talk.options:
        if not (_has_effect(talk, template, whole, name) if name in ("tools", "documents") else template.reads(name)):
            raise DataError(f"{name!r} is not used by the chat template; remove it, or use a template that does")
    _check_fields(talk, template)
    at = 0
    for place, turn in enumerate(talk.turns):
        for call in turn.get("tool_calls", ()):
            if call.get("function", call)["name"] not in whole:
                raise DataError(
                    "tool_calls are not used by the chat template; remove them, or use a template that does"
                )
        if turn["role"] != "assistant" and turn["content"]:
            at = _check_turn(talk, template, whole, place, at)


def _has_effect(talk: Conversation, template: Template, whole: str, name: str) -> bool:
    try:
        return template.text(talk.turns, without=name) != whole
    except DataError:  # it cannot do without
        return True


def _check_fields(talk: Conversation, template: Template) -> None:
    for turn in talk.turns:
        for name in turn.keys() - _OWN - _LINKS - ({"name"} if turn["role"] == "tool" else set()):
            if not any(map(template.reads, _REASONING if name in _REASONING else (name,))):
                raise DataError(
                    f"{name!r} of a {turn['role']} turn is not used by the chat template; remove it, or use a template that does"
                )


def _check_turn(talk: Conversation, template: Template, whole: str, place: int, at: int) -> int:
    """Look for a turn's text from ``at`` on; returns where it ends."""
    turn = talk.turns[place]
    content = turn["content"].strip()
    kind = (template.source, turn["role"], place == 0, talk.turns[place - 1]["role"])
    found = whole.find(content, at)
    if (found < 0 and content not in whole) or kind not in _known:
        if not _changes(talk.turns, place, template, whole):
            raise DataError(
                f"a {turn['role']} turn is not used by the chat template; remove it, or use a template that does"
            )
        _known.add(kind)
    return max(at, found + len(content))


def _changes(turns: list[dict[str, Any]], place: int, template: Template, text: str) -> bool:
    """Whether another beginning, and another end, of a turn's content each make another text."""
    content = turns[place]["content"]
    for other in (f"x{content}", f"{content}x"):
        try:
            if template.text([*turns[:place], {**turns[place], "content": other}, *turns[place + 1 :]]) == text:
                return False
        except DataError:  # looked at, at least
            continue
    return True


def check_answer(turns: list[dict[str, Any]], template: Template, text: str, part: str) -> None:
    """Raise ``DataError`` if something of the last turn, an answer, does not stand in its ``part`` of the ``text`` of the turns."""
    answer = turns[-1]
    content = answer.get("content") or ""
    if not _stands_in(content, part) and not _changes(turns, len(turns) - 1, template, text):
        raise DataError(
            "the chat template leaves out a part of an answer's content; remove it, or use a template that does not"
        )
    for name in _REASONING:
        if isinstance(answer.get(name), str) and not _stands_in(answer[name], part):
            raise DataError(
                f"the chat template leaves out {name!r} of an answer; remove it, or use a template that does not"
            )
    for call in answer.get("tool_calls", ()):
        _check_call(call.get("function", call), part)


def _check_call(function: Mapping[str, Any], part: str) -> None:
    if function["name"] not in part:
        raise DataError(
            f"the chat template leaves out the call of {function['name'][:40]!r}; remove it, or use a template that does not"
        )


def _stands_in(content: str, text: str) -> bool:
    """Whether a text holds another, whatever its spaces and line ends."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())
