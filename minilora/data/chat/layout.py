"""Where the answers of a conversation stand in its text, and what becomes of it: one example, or one for each answer.

The rule is exact and slow: for each answer the turns up to it are rendered, with and without it, and what it adds is compared with the
whole. A template that renders an answer otherwise once more turns follow (thinking is taken out of earlier ones) has each answer trained
in an example of its own, behind the text that the model would see. In a conversation of many answers the rule is asked for some of them,
of every kind and from all over it; marks that the template's own loop prints give the places of all, and must agree. So the time grows
with the length. Next file: ``data/chat/bounded.py``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.chat.template import Marked, Span, Template, shared_length
from minilora.data.chat.used import check_answer, check_used
from minilora.data.fields import Conversation
from minilora.errors import DataError

__all__ = ["Layout", "lay_out"]

MOST_EXACT = 16  # answers, up to which the rule is asked for each
_PROMPT = 100  # letters of the prompt's end, which may be the beginning of what is given as the answer (<think>)
_SPREAD = 8  # answers from all over a long conversation that it is asked for


@dataclass(frozen=True)
class Layout:
    """Texts, each with the spans of letters in it that are learnt.

    Attributes:
        rewrites: whether each answer has a text to itself. beyond: answers that were left out for being too far from the start.
        unended: whether the last answer of a text has no end token.
    """

    texts: list[tuple[str, list[Span]]]
    rewrites: bool = False
    beyond: int = 0
    unended: bool = False


@dataclass(frozen=True)
class _Answer:
    """An answer in the text of the turns up to it, and in that of the whole conversation (None if it stands there otherwise)."""

    text: str
    spans: list[Span]
    whole: list[Span] | None


class _Rewritten(Exception):
    """An answer stands otherwise in the whole text."""


def lay_out(talk: Conversation, template: Template, most: int) -> Layout:
    """The texts to learn from. Of those that an answer has to itself, none whose answer begins after ``most`` letters.

    Raises:
        DataError: the template fails, refuses the conversation, or leaves out a part of it.
    """
    whole = template.text(talk.turns)
    check_used(talk, template, whole)
    learnt = [at for at in talk.answers if talk.learnt[at]]
    try:
        spans = _by_marks(talk, template, whole, learnt) if len(learnt) > MOST_EXACT else None
        return _layout([(whole, _by_rule(talk, template, whole, learnt) if spans is None else spans)], template)
    except _Rewritten:
        pass
    texts: list[tuple[str, list[Span]]] = []
    for at in learnt:
        answer = _answer(talk, template, whole, at)
        if answer.spans and answer.spans[0][0] > most:
            break
        texts.append((answer.text, answer.spans))
    return _layout(texts, template, True, len(learnt) - len(texts))


def _layout(texts: list[tuple[str, list[Span]]], template: Template, rewrites: bool = False, beyond: int = 0) -> Layout:
    closed = all(text[: spans[-1][1]].rstrip().endswith(template.ends) for text, spans in texts if spans)
    return Layout(texts, rewrites, beyond, not closed)


def _by_rule(talk: Conversation, template: Template, whole: str, learnt: Sequence[int]) -> list[Span]:
    """Spans of all answers in the whole text. Raises ``_Rewritten`` if one stands there otherwise than at the end of its own."""
    return [span for at in learnt for span in _same(_answer(talk, template, whole, at))]


def _same(answer: _Answer) -> list[Span]:
    if answer.whole is None:
        raise _Rewritten
    return answer.whole


# ---- the rule


def _answer(talk: Conversation, template: Template, whole: str, at: int) -> _Answer:
    turns = talk.turns[: at + 1]
    text = rendered = whole if len(turns) == len(talk.turns) else template.text(turns)
    if template.says_itself:
        spans, begin = _own_spans(template, turns, text), 0
    else:
        text, begin = template.shown(turns, rendered)
        spans = [(begin, template.ends_at(text, begin, len(text)))]
    check_answer(turns, template, rendered, text[max(0, begin - _PROMPT) :])
    return _Answer(text, spans, spans if text == whole else _in_whole(template, text, spans, whole))


def _own_spans(template: Template, turns: list[dict[str, Any]], text: str) -> list[Span]:
    """Spans of the last answer, as the template marks them: those that the turns before it do not have."""
    before = 0
    if any(turn["role"] == "assistant" for turn in turns[:-1]):
        before = len(_marked(template, turns[:-1], template.text(turns[:-1])).spans)
    return _marked(template, turns, text).spans[before:]


def _marked(template: Template, turns: list[dict[str, Any]], text: str) -> Marked:
    marked = template.marked(turns, text)
    if marked is None:
        raise DataError(
            "the chat template does something with the text of its {% generation %} blocks, so they cannot be found again in what it "
            "renders; print them where they are"
        )
    return marked


def _in_whole(template: Template, text: str, spans: Sequence[Span], whole: str) -> list[Span] | None:
    """The spans of an answer in the whole text, which may lack end tokens that only the end of a text has; None if it lacks more."""
    shared, kept = shared_length(text, whole), []
    for begin, end in spans:
        if end > shared:
            cut = template.last_end(text, begin, shared)
            if not template.only_ends(text[cut:end]):
                return None
            end = cut
        kept += [(begin, end)] if begin < end else []
    if kept and not template.says_itself:
        kept[-1] = _closed(template, whole, kept[-1])
    return kept


def _closed(template: Template, whole: str, span: Span) -> Span:
    """An answer that ends in no end token is ended by the one that opens the next turn, where there is one."""
    begin, end = span
    if whole[begin:end].endswith(template.ends):
        return span
    opener = max((token for token in template.ends if whole.startswith(token, end)), key=len, default="")
    return begin, end + len(opener)


# ---- many answers


def _by_marks(talk: Conversation, template: Template, whole: str, learnt: Sequence[int]) -> list[Span] | None:
    """As ``_by_rule``, by marks of a loop of the template; None where no loop's marks agree with the rule."""
    marked = template.marked(talk.turns, whole)
    if marked is None:
        return None
    for loop in reversed(marked.loops):  # the last: those before it look for something first
        places, turns = dict(loop), [turn for turn, _ in loop]
        if turns != sorted(places) or not set(learnt) <= set(turns):
            continue
        found = {at: _same(_answer(talk, template, whole, at)) for at in _some(talk, whole, places, learnt)}
        spans = _between(template, marked, whole, loop, found, learnt)
        if spans and all(spans[at] == own for at, own in found.items()):
            return [span for at in learnt for span in spans[at]]
    return None


def _some(talk: Conversation, whole: str, places: Mapping[int, int], learnt: Sequence[int]) -> list[int]:
    """The first answer of each kind, and others from all over the conversation."""
    ends = dict(zip(places, [*list(places.values())[1:], len(whole)], strict=True))
    first: dict[Any, int] = {}
    for at in learnt:
        turn, after = talk.turns[at], talk.turns[at + 1]["role"] if at + 1 < len(talk.turns) else ""
        stands = (turn.get("content") or "").strip() in whole[places[at] : ends[at]]
        first.setdefault((*sorted(turn), talk.turns[at - 1]["role"], after, stands), at)
    step = (len(learnt) - 1) / (_SPREAD - 1)
    return sorted({*first.values(), *(learnt[round(number * step)] for number in range(_SPREAD))})


def _between(
    template: Template,
    marked: Marked,
    whole: str,
    loop: Sequence[tuple[int, int]],
    found: Mapping[int, list[Span]],
    learnt: Sequence[int],
) -> dict[int, list[Span]] | None:
    """Spans of each answer between its mark and the next one; None if not all begin with the same header."""
    begins = dict(loop)
    ends = dict(zip(begins, [*list(begins.values())[1:], len(whole)], strict=True))
    if template.says_itself:
        own = [begin for begin, _ in marked.spans]
        return {at: marked.spans[bisect_left(own, begins[at]) : bisect_left(own, ends[at])] for at in learnt}
    some, own_spans = next(iter(found.items()))
    header = whole[begins[some] : own_spans[0][0]]
    spans = {}
    for at in learnt:
        if not whole.startswith(header, begins[at]):
            return None
        begin = begins[at] + len(header)
        spans[at] = [_closed(template, whole, (begin, template.ends_at(whole, begin, ends[at])))]
    return spans
