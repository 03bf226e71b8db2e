"""What a record becomes: examples, token ids with labels that say which of them are learnt; and what is said of many records.

Next file: ``data/cutting.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from minilora.data.tokens import IGNORED
from minilora.errors import DataError

__all__ = ["Encoded", "Lesson", "Tally", "none_useful"]


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


def none_useful(count: int, max_length: int) -> DataError:
    """The error of so many records of which none has something to learn."""
    return DataError(
        f"none of {count} examples has a token to learn within max_length={max_length}; raise it or shorten the prompts"
    )


class Tally(NamedTuple):
    """How conversations were encoded.

    Attributes:
        parted: conversations that make an example of each answer. kept: those examples. lost: answers that max_length leaves out.
        unended: conversations whose last answer has no end token. divided: conversations that were parted between turns, parts: the
        examples that they make. cut: texts and exchanges that were too long in one piece, pieces: the examples that they make.
    """

    parted: int
    kept: int
    lost: int
    unended: int
    divided: int = 0
    parts: int = 0
    cut: int = 0
    pieces: int = 0

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
        if self.divided:
            yield (
                f"max_length={max_length}: {self.divided} conversations are longer, and parted between turns into {self.parts} examples"
            )
        if self.cut:
            yield f"max_length={max_length}: {self.cut} texts or single exchanges are longer, and cut into {self.pieces} examples"


@dataclass(frozen=True)
class Lesson:
    """The examples of one record, and how it was encoded."""

    examples: list[Encoded]
    tally: Tally
