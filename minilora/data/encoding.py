"""Records as examples: token ids, and labels that say which of them are learnt.

Conversations go through the tokenizer's chat template (``layout.py``), everything through the tokenizer (``tokens.py``).
Next file: ``data/examples.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minilora.data.chat.bounded import bounded
from minilora.data.fields import conversation
from minilora.data.chat.layout import Layout, lay_out
from minilora.data.records import Record, check_record
from minilora.data.chat.template import Template
from minilora.data.tokens import IGNORED, Desk, Text
from minilora.errors import DataError

__all__ = ["IGNORED", "Encoded", "Lesson", "Tally", "encode", "encode_all", "lessons", "none_useful"]

_BATCH = 256  # records that are tokenized together


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and labels of the same length with ``IGNORED`` where nothing is to be learnt.

    ``where`` is the file and line that it comes from, if it does, for messages.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool = False
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise DataError(
                f"{self.where or 'example'}: {len(self.input_ids)} tokens and {len(self.labels)} labels; wanted one label a token"
            )

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss (the first token of a sequence is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(record: Record, tokenizer: Any, max_length: int) -> Encoded:
    """Token ids and labels of one record; what is longer than ``max_length`` loses its end (``truncated`` says so).

    Args:
        record: as ``read_jsonl`` returns it.
        tokenizer: of the model; conversations need its chat template.
        max_length: in tokens.

    Raises:
        DataError: as ``encode_all``; or the conversation makes more than one example.
    """
    lesson = next(lessons([record], tokenizer, max_length))
    if len(lesson.examples) != 1:
        raise DataError(
            f"{_at(record)}the chat template rewrites earlier turns as a conversation grows, so this one makes an example of each answer; "
            "encode_all returns them"
        )
    return lesson.examples[0]


def encode_all(
    records: Sequence[Record], tokenizer: Any, max_length: int, say: Callable[[str], None] | None = None
) -> list[Encoded]:
    """Every record encoded; examples that ``max_length`` leaves without a token to learn are left out.

    A conversation of which the chat template renders an answer otherwise once more turns follow makes an example of each answer, behind
    the text that the model would see; ``say`` gets a line about it.

    Raises:
        DataError: nothing is left to learn from; a conversation, and the tokenizer has no chat template; the template fails, refuses the
            conversation, does not end, or does not use a part of it; by path and line.
    """
    made = list(lessons(records, tokenizer, max_length))
    useful = [example for lesson in made for example in lesson.examples if example.supervised]
    if not useful:
        raise none_useful(len(made), max_length)
    if say:
        for line in Tally(*map(sum, zip(*(lesson.tally for lesson in made), strict=True))).remarks(max_length):
            say(line)
    return useful


def none_useful(count: int, max_length: int) -> DataError:
    """The error of so many records of which none has something to learn."""
    return DataError(
        f"none of {count} examples has a token to learn within max_length={max_length}; raise it or shorten the prompts"
    )


class Tally(NamedTuple):
    """How conversations were encoded.

    Attributes:
        parted: conversations that make an example of each answer. kept: those examples. lost: answers that max_length leaves out.
        unended: conversations whose last answer has no end token.
    """

    parted: int
    kept: int
    lost: int
    unended: int

    def remarks(self, max_length: int) -> Iterator[str]:
        """What is to be said of it."""
        if self.parted:
            yield (
                f"the chat template renders an answer otherwise once more turns follow: {self.parted} conversations are trained turn by "
                f"turn, as {self.kept} examples"
                + (f"; {self.lost} answers more begin after max_length={max_length}" if self.lost else "")
            )
        if self.unended:
            yield f"the chat template ends the last answer of {self.unended} conversations with no end token, so its end is not learnt"


@dataclass(frozen=True)
class Lesson:
    """The examples of one record, and the layout that they come from."""

    examples: list[Encoded]
    layout: Layout

    @property
    def tally(self) -> Tally:
        """Of this record alone."""
        if not self.layout.rewrites:
            return Tally(0, 0, 0, int(self.layout.unended))
        kept = sum(example.supervised > 0 for example in self.examples)
        return Tally(1, kept, self.layout.beyond + len(self.examples) - kept, int(self.layout.unended))


def lessons(records: Sequence[Record], tokenizer: Any, max_length: int) -> Iterator[Lesson]:
    """What each record becomes, in order. Raises as ``encode_all``."""
    for record in records:
        if not hasattr(record, "where"):
            check_record(record)
    desk, laid = Desk(tokenizer), _layouts(records, tokenizer, max_length)
    for start in range(0, len(records), _BATCH):
        some = records[start : start + _BATCH]
        layouts = [next(laid) if _is_chat(record, tokenizer) else None for record in some]
        texts = [_texts(layout) if layout else [desk.plain(rec)] for layout, rec in zip(layouts, some, strict=True)]
        encoded = iter(desk.encode([text for each in texts for text in each]))
        for record, layout, each in zip(some, layouts, texts, strict=True):
            examples = [_example(*next(encoded), max_length, getattr(record, "where", "")) for _ in each]
            yield Lesson(examples, layout or Layout([]))


def _texts(layout: Layout) -> list[Text]:
    return [Text(text, spans, False) for text, spans in layout.texts]


def _example(ids: list[int], labels: list[int], most: int, where: str) -> Encoded:
    return Encoded(tuple(ids[:most]), tuple(labels[:most]), truncated=len(ids) > most, where=where)


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
    most = max_length * max(map(len, tokenizer.get_vocab()))
    done = 0
    try:
        for found in bounded(lambda record: vars(_laid_out(record, tokenizer, ends, most)), chats):
            done += 1
            yield Layout(**found)
    except DataError as error:
        raise DataError(f"{_at(chats[done])}{error}") from None


def _laid_out(record: Record, tokenizer: Any, ends: Sequence[str], most: int) -> Layout:
    """The layout of a record. Arguments of tool calls are objects, or where the template fails over those, their text as JSON."""
    talk = conversation(record)
    try:
        return lay_out(talk, Template(tokenizer, talk.options, ends), most)
    except DataError:
        other = conversation(record, arguments_as_text=True)
        if talk == other:
            raise
    return lay_out(other, Template(tokenizer, other.options, ends), most)


def _special_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""})
