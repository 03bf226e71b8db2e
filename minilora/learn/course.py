"""The twelve lessons of the course: what each asks, and the functions that its exercises want. Nothing here needs torch.

Next file: ``learn/answer.py``.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from minilora.errors import ConfigError

__all__ = ["LESSONS", "Lesson", "file_of", "lesson"]

_HERE = Path(__file__).parent


def file_of(kind: str, number: int) -> str:
    """What the reader's file of a "lesson" or "mutant" is called."""
    return f"{kind}_{number:02}.py"


@dataclass(frozen=True)
class Lesson:
    """A lesson.

    Attributes:
        number: from 1. title, question: as the course's page has them. page: where that page lies in the documentation.
    """

    number: int
    title: str
    question: str
    page: str

    @property
    def file(self) -> str:
        """What the reader's file is called."""
        return file_of("lesson", self.number)

    @property
    def exercise(self) -> str:
        """The text of the file to fill in."""
        return (_HERE / "exercises" / self.file).read_text(encoding="utf-8")

    @property
    def solution(self) -> str:
        """The text of a right file."""
        return (_HERE / "solutions" / self.file).read_text(encoding="utf-8")

    @property
    def functions(self) -> list[str]:
        """The names of the functions that are wanted, in the order of the file."""
        return [node.name for node in ast.parse(self.exercise).body if isinstance(node, ast.FunctionDef)]


LESSONS = tuple(
    Lesson(number, title, question, f"lessons/{number:02}_{page}")
    for number, (title, question, page) in enumerate(
        (
            ("What a low rank is", "How few numbers can hold most of a matrix?", "what_a_low_rank_is"),
            (
                "LoRA in twenty lines",
                "Why does B start at zero and A at random, and what does alpha / r do?",
                "lora_in_twenty_lines",
            ),
            ("Where adapters go", "Which layers does a name mean, and what do they cost?", "where_adapters_go"),
            ("What is learnt from", "Which tokens count in the loss?", "what_is_learnt_from"),
            (
                "One block by hand",
                "How do 64 weights become 32 bytes and a scale, and what comes back?",
                "one_block_by_hand",
            ),
            ("Counting bits", "Why does a weight of four bits take 4.5, or 4.127?", "counting_bits"),
            (
                "The backward pass, and what is not saved",
                "What has to be kept to train beside a packed weight?",
                "what_is_not_saved",
            ),
            ("The kernel", "How many bytes move, and does that or the arithmetic set the time?", "the_kernel"),
            ("Merging, and what rounding eats", "What does rounding eat of an update?", "merging"),
            ("Many adapters", "How does each row of a batch get an adapter of its own?", "many_adapters"),
            ("Your own variant", "Which law must every variant keep?", "your_own_variant"),
            ("Reading a fine-tuning", "What do spectra, new directions and a sweep say?", "reading_a_fine_tuning"),
        ),
        1,
    )
)


def lesson(number: int) -> Lesson:
    """The lesson of this number. Raises ``ConfigError``."""
    if not 1 <= number <= len(LESSONS):
        raise ConfigError(f"lesson {number}: is not there; wanted 1 to {len(LESSONS)}; minilora learn lists them")
    return LESSONS[number - 1]
