"""Records as examples: token ids, and labels that say which of them are learnt.

Conversations go through the tokenizer's chat template (``chat/layout.py``), everything through the tokenizer (``tokens.py``), and what is
longer than ``max_length`` is cut (``cutting.py``).
Next file: ``data/places.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from minilora.data.chat.bounded import bounded
from minilora.data.chat.layout import Layout, lay_out
from minilora.data.chat.template import Template
from minilora.data.cutting import Ids, examples_in, groups, part_of, units
from minilora.data.fields import Conversation, conversation
from minilora.data.lesson import Encoded, Lesson, Tally, none_useful
from minilora.data.shapes.recognise import OPTIONS
from minilora.data.shapes.record import Record
from minilora.data.shapes.understood import understood
from minilora.data.tokens import IGNORED, Desk, Text
from minilora.errors import DataError

__all__ = [
    "IGNORED",
    "Encoded",
    "Lesson",
    "Made",
    "Tally",
    "encode",
    "encode_all",
    "lessons",
    "most_letters",
    "none_useful",
    "parted",
    "with_template",
]

T = TypeVar("T")
_BATCH = 256  # records that are tokenized together


def encode(record: Record, tokenizer: Any, max_length: int) -> Encoded:
    """Token ids and labels of one record; what is longer than ``max_length`` loses its end (``truncated`` says so).

    Args:
        record: as ``read_jsonl`` returns it.
        tokenizer: of the model; conversations need its chat template.
        max_length: in tokens.

    Raises:
        DataError: as ``encode_all``; or the conversation makes more than one example.
    """
    lesson = next(lessons([record], tokenizer, max_length, truncate=True))
    if len(lesson.examples) != 1:
        raise DataError(
            f"{_at(record)}the chat template rewrites earlier turns as a conversation grows, so this one makes an example of each answer; "
            "encode_all returns them"
        )
    return lesson.examples[0]


def encode_all(
    records: Sequence[Record],
    tokenizer: Any,
    max_length: int,
    say: Callable[[str], None] | None = None,
    truncate: bool = False,
) -> list[Encoded]:
    """Every record encoded, in as many examples as ``max_length`` makes of it.

    A conversation of which the chat template renders an answer otherwise once more turns follow makes an example of each answer, behind
    the text that the model would see; ``say`` gets a line about it, and about what was cut.

    Args:
        truncate: what is longer than ``max_length`` loses its end, and examples that have no token to learn then are left out.

    Raises:
        DataError: nothing is left to learn from; a conversation, and the tokenizer has no chat template; the template fails, refuses the
            conversation, does not end, or does not use a part of it; by path and line.
    """
    made = list(lessons(records, tokenizer, max_length, truncate))
    useful = [example for lesson in made for example in lesson.examples if example.supervised]
    if not useful:
        raise none_useful(len(made), max_length)
    if say:
        for line in Tally(*map(sum, zip(*(lesson.tally for lesson in made), strict=True))).remarks(max_length):
            say(line)
    return useful


@dataclass(frozen=True)
class Made:
    """A record, or a part of one, in tokens.

    Attributes:
        layout: of a conversation. texts: what was tokenized. ids: of each text its tokens, however many, and their labels.
    """

    record: Record
    layout: Layout | None
    texts: list[Text]
    ids: list[Ids]

    def is_long(self, most: int) -> bool:
        """Whether a text of it is too long, or an answer was left out for standing too far from the start."""
        return any(len(ids) > most for ids, _ in self.ids) or bool(self.layout and self.layout.beyond)


def lessons(records: Sequence[Record], tokenizer: Any, max_length: int, truncate: bool = False) -> Iterator[Lesson]:
    """What each record becomes, in order. Raises as ``encode_all``."""
    for parts in parted(records, Desk(tokenizer), max_length, truncate):
        yield _lesson(parts, max_length, truncate)


def parted(records: Sequence[Record], desk: Desk, max_length: int, truncate: bool) -> Iterator[list[Made]]:
    """Each record in tokens: in one part, or in several where it is too long and has several exchanges. Raises as ``encode_all``."""
    records = [record if hasattr(record, "where") else understood(record) for record in records]
    made = _made(records, desk, max_length)
    while batch := list(islice(made, _BATCH)):
        parts = {} if truncate else _divided(batch, desk, max_length)
        for at, whole in enumerate(batch):
            yield parts.get(at, [whole])


def _made(records: Sequence[Record], desk: Desk, max_length: int) -> Iterator[Made]:
    """Records in tokens, however long."""
    laid = _layouts(records, desk.tokenizer, max_length)
    for start in range(0, len(records), _BATCH):
        some = records[start : start + _BATCH]
        layouts = [next(laid) if _is_chat(record, desk.tokenizer) else None for record in some]
        texts = [
            _texts(layout) if layout else [_plain(record, desk)] for layout, record in zip(layouts, some, strict=True)
        ]
        encoded = iter(desk.encode([text for each in texts for text in each]))
        for record, layout, each in zip(some, layouts, texts, strict=True):
            yield Made(record, layout, each, [next(encoded) for _ in each])


def _texts(layout: Layout) -> list[Text]:
    return [Text(text, spans, False) for text, spans in layout.texts]


def _plain(record: Record, desk: Desk) -> Text:
    if unused := next((name for name in OPTIONS if record.get(name) is not None), None):
        raise DataError(
            f"{_at(record)}the tokenizer has no chat template, so {unused!r} would not be used; leave it out, or use an instruct model"
        )
    return desk.plain(record)


def _divided(batch: Sequence[Made], desk: Desk, most: int) -> dict[int, list[Made]]:
    """Parts of the conversations of a batch that are too long and have several exchanges, by their place in the batch."""
    long = [(at, *units(whole.record)) for at, whole in enumerate(batch) if whole.layout and whole.is_long(most)]
    long = [(at, head, found) for at, head, found in long if len(found) > 1]
    if not long:
        return {}
    lengths = iter(
        _lengths([part_of(batch[at].record, head, [unit]) for at, head, found in long for unit in found], desk)
    )
    todo = []
    for at, head, found in long:
        own = [next(lengths) for _ in found]
        whole = len(batch[at].ids[-1][0]) if batch[at].ids else sum(own)
        todo += [(at, first, head, found[first:end]) for first, end in groups(own, whole, most)]
    done: list[tuple[int, int, Made]] = []
    while todo:  # again only where a template makes more of exchanges together than of each
        made = list(_made([part_of(batch[at].record, head, some) for at, _, head, some in todo], desk, most))
        again = []
        for (at, first, head, some), part in zip(todo, made, strict=True):
            if part.is_long(most) and len(some) > 1:
                again += [(at, first, head, some[:-1]), (at, first + len(some) - 1, head, some[-1:])]
            else:
                done.append((at, first, part))
        todo = again
    parts: dict[int, list[Made]] = {}
    for at, _, part in sorted(done, key=lambda each: each[:2]):
        parts.setdefault(at, []).append(part)
    return parts


def _lengths(records: Sequence[Record], desk: Desk) -> list[int]:
    """Tokens of each conversation, as the template renders it."""
    ends = _special_tokens(desk.tokenizer)
    texts = bounded(
        lambda record: _with_arguments(record, desk.tokenizer, ends, lambda talk, own: own.text(talk.turns)), records
    )
    return [len(ids) for ids, _ in desk.encode([Text(text, [], False) for text in texts])]


def _lesson(parts: Sequence[Made], most: int, truncate: bool) -> Lesson:
    """The examples of a record, of all its parts."""
    examples: list[Encoded] = []
    count = kept = cut = pieced = 0
    for part in parts:
        where, is_text = getattr(part.record, "where", ""), part.record.get("text") is not None
        for ids, labels in part.ids:
            own = [
                Encoded(tuple(ids[at : at + len(learnt)]), tuple(learnt), truncate and len(ids) > most, where)
                for at, learnt in examples_in(labels, most, is_text, truncate)
            ]
            if len(ids) > most and not truncate:
                cut, pieced = cut + 1, pieced + len(own)
            examples += own
            count, kept = count + 1, kept + any(example.supervised for example in own)
    layouts = [part.layout for part in parts if part.layout]
    parted = any(layout.rewrites for layout in layouts)
    lost = sum(layout.beyond for layout in layouts) + count - kept
    divided = len(parts) > 1
    return Lesson(
        examples,
        Tally(
            parted=int(parted),
            kept=kept if parted else 0,
            lost=lost if parted else 0,
            unended=int(any(layout.unended for layout in layouts)),
            divided=int(divided),
            parts=len(parts) if divided else 0,
            cut=cut,
            pieces=pieced,
        ),
    )


def _at(record: Record) -> str:
    where = getattr(record, "where", "")
    return f"{where}: " if where else ""


# ---- chat templates


def _is_chat(record: Record, tokenizer: Any) -> bool:
    return record.get("messages") is not None or (record.get("text") is None and bool(tokenizer.chat_template))


def _layouts(records: Sequence[Record], tokenizer: Any, max_length: int) -> Iterator[Layout]:
    """The layout of each conversation, rendered in a process that can be ended. Raises ``DataError`` with the record's place."""
    chats = [record for record in records if _is_chat(record, tokenizer)]
    if not chats:
        return
    if not tokenizer.chat_template:
        raise DataError(
            f"{_at(chats[0])}the tokenizer has no chat template; use an instruct model, or 'prompt' and 'completion' instead of 'messages'"
        )
    ends = _special_tokens(tokenizer)
    most = most_letters(tokenizer, max_length)
    done = 0
    try:
        for found in bounded(lambda record: vars(_laid_out(record, tokenizer, ends, most)), chats):
            done += 1
            yield Layout(**found)
    except DataError as error:
        raise DataError(f"{_at(chats[done])}{error}") from None


def _laid_out(record: Record, tokenizer: Any, ends: Sequence[str], most: int) -> Layout:
    """The layout of a record."""
    return _with_arguments(record, tokenizer, ends, lambda talk, template: lay_out(talk, template, most))


def most_letters(tokenizer: Any, max_length: int) -> int:
    """Letters that so many tokens have at most."""
    return max_length * max(map(len, tokenizer.get_vocab()))


def with_template(record: Record, tokenizer: Any, work: Callable[[Conversation, Template], T]) -> T:
    """Work on a conversation and the template that renders it. Raises ``DataError`` as ``work`` does."""
    return _with_arguments(record, tokenizer, _special_tokens(tokenizer), work)


def _with_arguments(
    record: Record, tokenizer: Any, ends: Sequence[str], work: Callable[[Conversation, Template], T]
) -> T:
    """Work on a conversation. Arguments of tool calls are objects, or where the template fails over those, their text as JSON."""
    talk = conversation(record)
    try:
        return work(talk, Template(tokenizer, talk.options, ends))
    except DataError:
        other = conversation(record, arguments_as_text=True)
        if talk == other:
            raise
    return work(other, Template(tokenizer, other.options, ends))


def _special_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""})
