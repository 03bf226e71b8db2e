"""What an example is, token by token, for people who look at it: text, id, role, whether it counts, and what was cut.

A record goes the very way that training sends it (``encoding.parted``), so a lens shows what is trained on and nothing that was encoded
beside it. What the tokenizer itself gives for a whole conversation is compared with that, and the first token that differs is named.
Next file: ``data/batches.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from minilora.data.chat.bounded import bounded
from minilora.data.chat.layout import lay_out
from minilora.data.chat.roles import Said, roles_in
from minilora.data.chat.template import Template, shared_length
from minilora.data.cutting import examples_in
from minilora.data.encoding import Made, most_letters, parted, with_template
from minilora.data.fields import Conversation
from minilora.data.lesson import Encoded
from minilora.data.shapes.record import Record
from minilora.data.tokens import IGNORED, Desk, Text

__all__ = ["Lens", "Token", "lens_of", "lenses", "seen_alone"]

_LONGEST = 4  # bytes of a letter, and so tokens that one can be parted into
_HALF = "\ufffd"  # what a tokenizer decodes to where a letter is not whole yet


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        text: what it adds to the text as the tokenizer decodes it; of a letter that several tokens make, the last has it. name: what the
        tokenizer calls it. role: whose words it belongs to; "template" or "tokenizer" where one of these has put it, "" if that is not
        known. counts: whether it counts in the loss. cut: whether it stands in the text, and in no example.
    """

    text: str
    name: str
    id: int
    role: str
    counts: bool
    cut: bool = False


@dataclass(frozen=True)
class Lens:
    """An example with the tokens that were cut from its text before and after it.

    Attributes:
        example: as training has it. tokens: its tokens, and those that were cut. first: place in the text of the first of them, from 0.
        number, count: which of the examples of its record it is, from 1. warning: where the ids are not those that the tokenizer gives
        for the whole conversation; or why nothing is known of the record.
    """

    example: Encoded
    tokens: tuple[Token, ...]
    first: int = 0
    number: int = 1
    count: int = 1
    warning: str = ""


def lens_of(example: Encoded, record: Record, tokenizer: Any, max_length: int, truncate: bool = False) -> Lens | None:
    """The lens of an example that a record made; None if it did not make it (the file changed, or the settings)."""
    return next((lens for lens in lenses(record, tokenizer, max_length, truncate) if lens.example == example), None)


def seen_alone(example: Encoded, tokenizer: Any, why: str) -> Lens:
    """An example of which the record is not at hand, for the reason ``why``: without roles, and without what was cut."""
    counts = [at > 0 and label != IGNORED for at, label in enumerate(example.labels)]
    each = zip(*_named(example.input_ids, tokenizer), example.input_ids, counts, strict=True)
    return Lens(example, tuple(Token(text, name, id, "", own) for text, name, id, own in each), warning=why)


def lenses(record: Record, tokenizer: Any, max_length: int, truncate: bool = False) -> list[Lens]:
    """Every example that a record makes and that has something to learn, in order.

    Args:
        record: as ``read`` returns it. max_length, truncate: as of ``encode_all``.

    Raises:
        DataError: as ``encode_all``.
    """
    desk = Desk(tokenizer)
    (parts,) = parted([record], desk, max_length, truncate)
    found = [lens for part in parts for lens in _of_part(part, desk, max_length, truncate)]
    return [replace(lens, number=number, count=len(found)) for number, lens in enumerate(found, 1)]


def _of_part(part: Made, desk: Desk, most: int, truncate: bool) -> Iterator[Lens]:
    is_text = part.record.get("text") is not None
    every, whole, goes_on = _said(part, desk.tokenizer, most)
    for text, (ids, labels), said in zip(part.texts, part.ids, every, strict=True):
        texts, names = _named(ids, desk.tokenizer)
        roles = _roles(text, said, desk, "template" if part.layout else "tokenizer")
        warning = _difference(ids, whole, goes_on, desk.tokenizer) if part.layout else ""
        cuts = examples_in(labels, most, is_text, truncate)
        where = getattr(part.record, "where", "")
        useful = []
        for at, learnt in cuts:
            own = tuple(ids[at : at + len(learnt)])
            example = Encoded(own, tuple(learnt), truncate and len(ids) > most, where)
            useful += [(at, example)] if example.supervised else []
        for (first, end), (at, example) in zip(_around(useful, len(ids)), useful, strict=True):
            labelled = {at + place: label for place, label in enumerate(example.labels)}
            tokens = tuple(
                Token(
                    texts[p],
                    names[p],
                    ids[p],
                    roles[p],
                    p > at and labelled.get(p, IGNORED) != IGNORED,
                    p not in labelled,
                )
                for p in range(first, end)
            )
            yield Lens(example, tokens, first, warning=warning)


def _around(useful: Sequence[tuple[int, Encoded]], length: int) -> list[tuple[int, int]]:
    """From where to where each example is shown: with the tokens before the first, and those between it and the next one."""
    begins = [0, *(at for at, _ in useful[1:])]
    ends = [at + len(example.input_ids) for at, example in useful]
    return [(begin, max(end, after)) for begin, end, after in zip(begins, ends, [*begins[1:], length], strict=False)]


# ---- roles


def _said(part: Made, tokenizer: Any, most: int) -> tuple[list[Said], list[int], bool]:
    """Of each text whose words stand where; what the tokenizer gives for the whole conversation; whether a text may end before it does."""
    if part.layout is None:
        return [_plain(part.record, text) for text in part.texts], [], False
    letters = most_letters(tokenizer, most)

    def work(talk: Conversation, template: Template) -> list[Any]:
        layout = lay_out(talk, template, letters)
        return [roles_in(talk, template, layout), template.ids(talk.turns), layout.rewrites]

    (found,) = bounded(lambda record: with_template(record, tokenizer, work), [part.record])
    return found[0], found[1], found[2]


def _plain(record: Record, text: Text) -> Said:
    if text.spans is None:
        return {"text": [(0, len(text.text))]}
    begin = text.spans[0][0]
    return {"completion": list(text.spans), "prompt": [(0, begin)]}


def _roles(text: Text, said: Said, desk: Desk, otherwise: str) -> list[str]:
    """The role of each token: of the first that has a letter in it, by the rule that says which tokens count."""
    every = desk.encode([Text(text.text, spans, text.edges) for spans in said.values()])
    marks = [
        [role if label != IGNORED else "" for label in labels] for role, (_, labels) in zip(said, every, strict=True)
    ]
    return [next(filter(None, each), otherwise) for each in zip(*marks, strict=True)]


def _difference(own: Sequence[int], whole: Sequence[int], goes_on: bool, tokenizer: Any) -> str:
    """Which token is the first that is another one in the whole conversation, in words; "" if none is."""
    at = shared_length(own, whole)
    if at == len(own) and (goes_on or at == len(whole)):
        return ""
    here, there = (_shown(ids[at : at + 1], tokenizer) for ids in (own, whole))
    why = (
        "the chat template renders an answer otherwise once more turns follow, so each is an example of its own"
        if goes_on
        else "it does not tokenize a conversation as it tokenizes its text"
    )
    return f"token {at + 1} is {here}, and the tokenizer gives {there} for the whole conversation: {why}"


def _shown(ids: Sequence[int], tokenizer: Any) -> str:
    return f"{_decode(ids, tokenizer)!r} (id {ids[0]})" if ids else "none"


# ---- names


def _named(ids: Sequence[int], tokenizer: Any) -> tuple[list[str], list[str]]:
    """What each token adds to the text, and its name."""
    return list(_added(ids, partial(_decode, tokenizer=tokenizer))), [
        str(n) for n in tokenizer.convert_ids_to_tokens(list(ids))
    ]


def _added(ids: Sequence[int], decode: Any) -> Iterable[str]:
    """Each token is decoded behind the one before it: many a tokenizer drops the space of a first token."""
    whole = -1  # the last token that ended in a whole letter
    for at in range(len(ids)):
        before = ids[max(0, whole) : whole + 1]
        known, text = decode(before), decode([*before, *ids[whole + 1 : at + 1]])
        piece = text[len(known) :] if text.startswith(known) else decode(ids[whole + 1 : at + 1])
        if piece.endswith(_HALF) and at - whole < _LONGEST:
            yield _HALF
            continue
        yield piece.lstrip(_HALF) or piece
        whole = at


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
