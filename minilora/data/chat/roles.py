"""Whose words stand where in a rendered conversation, for people who look at it; no label depends on it.

The words of a turn are its content as it was given, looked for in the part of the text that its turn makes; of an answer they are the
letters that are learnt. Where a template prints a content otherwise than it was given, all that it prints for the turn counts as the
turn's. What belongs to no turn is the template's own. Next file: ``data/lens.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minilora.data.chat.layout import Layout
from minilora.data.chat.template import Span, Template, shared_length
from minilora.data.fields import Conversation
from minilora.errors import DataError

__all__ = ["Said", "roles_in"]

Said = dict[str, list[Span]]  # a role to the letters of its words, in the order of the text


def roles_in(talk: Conversation, template: Template, layout: Layout) -> list[Said]:
    """Whose words stand where in each text of a layout of this conversation."""
    learnt = [at for at in talk.answers if talk.learnt[at]]
    found = []
    for number, (text, spans) in enumerate(layout.texts):
        last = learnt[number] if layout.rewrites else len(talk.turns) - 1
        known = {learnt[number]} if layout.rewrites else set(learnt)
        found.append(_roles(talk.turns[: last + 1], known, template, text, spans))
    return found


def _roles(
    turns: Sequence[dict[str, Any]], known: set[int], template: Template, text: str, spans: Sequence[Span]
) -> Said:
    """Of one text; the words of the ``known`` turns are the ``spans``."""
    said: Said = {"assistant": list(spans)}
    begins, before = _begins(turns, template, text)
    ends = [*begins[1:], len(text)]
    for at, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        reach = ends[before] if at < before else end  # Llama 2 prints the system turn inside of the first question
        words = _words(turns[at], text, begin, end, reach)
        if at not in known and words[0] < words[1]:
            said.setdefault(turns[at]["role"], []).append(words)
    return {role: sorted(own) for role, own in said.items()}


def _words(turn: dict[str, Any], text: str, begin: int, end: int, reach: int) -> Span:
    """The content of a turn up to ``reach``, the last place of it, for a template's own words may stand before; else all of its part."""
    content = (turn.get("content") or "").strip()
    at = text.rfind(content, begin, reach) if content else -1
    return (at, at + len(content)) if at >= 0 else (begin, end)


def _begins(turns: Sequence[dict[str, Any]], template: Template, text: str) -> tuple[list[int], int]:
    """Where each turn begins, and how many stand before the loop of the template that says so.

    Where no loop went through the turns, one begins after what those before it make alone.
    """
    marked = template.marked(turns, text)
    for loop in reversed(marked.loops if marked else []):
        before = len(turns) - len(loop)
        if loop and [turn for turn, _ in loop] == list(range(before, len(turns))):
            return [0] * before + [place for _, place in loop], before
    begins = [0]
    for count in range(1, len(turns)):
        try:
            alike = shared_length(template.text(turns[:count]), text)
        except DataError:  # it does not take so few turns
            alike = 0
        begins.append(max(begins[-1], alike))
    return begins, 0
