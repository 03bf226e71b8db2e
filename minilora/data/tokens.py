"""Texts as token ids and labels: a text is tokenized once and whole, and a token counts if it has a letter of what is learnt.

So the ids are those that the tokenizer gives for the whole text, and nothing is cut where a token joins two pieces. Start and end tokens
are what the chat template prints, or without one what the tokenizer puts; after a ``completion`` comes the end token, once. A ``text``
is learnt as it is: whoever wants its end learnt writes the end token into it. Next file: ``data/lesson.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minilora.data.chat.template import Span, shared_length

__all__ = ["IGNORED", "Desk", "Text"]

IGNORED = -100  # label of a token that does not count


@dataclass(frozen=True)
class Text:
    """A text to tokenize: ``spans`` of letters that count, None for all; ``edges``: with the tokenizer's own start and end tokens."""

    text: str
    spans: list[Span] | None
    edges: bool


class Desk:
    """A tokenizer, and what it puts around a text of its own accord."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def puts(self) -> tuple[bool, bool]:
        """Whether it puts its start token before a text, and its end token after it."""
        bare, whole = (self.tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
        start, end = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        before, after = whole[: max(0, len(whole) - len(bare))], whole[len(bare) :]
        return start is not None and start in before, end is not None and end in after[-1:]

    def plain(self, record: Mapping[str, Any]) -> Text:
        """A record that no template renders."""
        if record.get("text") is not None:
            return Text(self._without_edges(record["text"]), None, True)
        begin = self._without_edges(record["prompt"], end=False)
        end = getattr(record, "apart", "") + self._without_edges(record["completion"], start=False)
        eos = self.tokenizer.eos_token or ""
        if not self.puts[1] and not end.endswith(eos):
            end += eos
        return Text(begin + end, [(len(begin), len(begin) + len(end))], True)

    def _without_edges(self, text: str, start: bool = True, end: bool = True) -> str:
        """A text without the start and end tokens that the tokenizer will put: there is one of each."""
        if start and self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token) and self.puts[0]:
            text = text[len(self.tokenizer.bos_token) :]
        if end and self.tokenizer.eos_token and text.endswith(self.tokenizer.eos_token) and self.puts[1]:
            text = text[: -len(self.tokenizer.eos_token)]
        return text

    def encode(self, texts: Sequence[Text]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of each."""
        done: dict[int, tuple[list[int], list[int]]] = {}
        for edges in (False, True):
            some = [at for at, text in enumerate(texts) if text.edges == edges]
            for at, (ids, places) in zip(some, self._tokens([texts[at] for at in some], edges), strict=True):
                spans = texts[at].spans
                labels = ids if spans is None else _labels(ids, places, spans)
                if edges and spans and self.puts[1]:
                    labels = [*labels[:-1], ids[-1]]  # it stands for no letter
                done[at] = ids, labels
        return [done[at] for at in range(len(texts))]

    def _tokens(self, texts: Sequence[Text], edges: bool) -> Iterator[tuple[list[int], Sequence[Span]]]:
        """Ids of each text, and the letters that each token stands for."""
        if not texts:
            return
        if not getattr(self.tokenizer, "is_fast", False):
            for text in texts:
                ids = list(self.tokenizer(text.text, add_special_tokens=edges).input_ids)
                yield ids, self._measured(text, ids, edges)
            return
        each = [text.text for text in texts]
        found = self.tokenizer(each, add_special_tokens=edges, return_offsets_mapping=True, verbose=False)
        yield from zip(found["input_ids"], found["offset_mapping"], strict=True)

    def _measured(self, text: Text, ids: list[int], edges: bool) -> list[Span]:
        """For a tokenizer that does not say its tokens' letters: tokens up to a border are those that the text cut there begins with."""
        places: list[Span] = []
        for border in sorted({border for span in text.spans or () for border in span} | {0}, reverse=True):
            before = self.tokenizer(text.text[:border], add_special_tokens=edges).input_ids
            first = shared_length(before, ids) if border else 0
            places[:0] = [(border, border + 1)] * (len(ids) - len(places) - first)
        return places


def _labels(ids: Sequence[int], places: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels of the tokens that have a letter in a span. Tokens and spans are in the order of the text."""
    labels, at = [], 0
    for token, (begin, end) in zip(ids, places, strict=True):
        while at < len(spans) and begin >= spans[at][1]:
            at += 1
        labels.append(token if at < len(spans) and end > spans[at][0] else IGNORED)
    return labels
