"""The demo: SmolLM2-135M learns to talk like a lighthouse keeper, in four bits, on a processor, in minutes.

The prompts asked before and after are not in the training set. How much of the voice took hold is counted, not judged: the share of
answers that open and close as the keeper does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["DATA", "STARTER", "in_voice", "prompts"]

HERE = Path(__file__).parent
DATA = HERE / "keeper.jsonl"
STARTER = HERE / "starter.jsonl"  # ten lines that ``minilora init`` gives to begin with


def prompts(kind: str = "unseen") -> list[str]:
    """Prompts that are not in the training set: "unseen" or "second", six each."""
    return list(_prompts()[kind])


def in_voice(answers: Iterable[str]) -> float:
    """The share of answers with the keeper's opening words (a short answer may be cut off before the closing ones)."""
    said = list(answers)
    return sum(answer.startswith(_prompts()["voice"]["opens"]) for answer in said) / len(said)


def _prompts() -> dict[str, Any]:
    return json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
