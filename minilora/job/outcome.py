"""What a fine-tuning job did: ``Outcome``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a job did: the records of ``train``, the answers ``{prompt, before, after}``, and of all sessions
    together the seconds and the most memory (MB) of each phase; and how many ``sessions`` there were."""

    records: list[dict[str, Any]]
    answers: list[dict[str, str]]
    seconds: Mapping[str, float]
    peaks_mb: Mapping[str, float]
    folder: Path
    sessions: int = 1

    @property
    def peak_mb(self) -> float:
        """The most memory of all phases, in MB; 0 where the system does not say it."""
        return max(self.peaks_mb.values(), default=0.0)

    @property
    def held_out(self) -> list[float | None]:
        """The loss of each evaluation, None for one that was not finite."""
        return [record["eval_loss"] for record in self.records if "eval_loss" in record]

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [record["loss"] for record in self.records if "loss" in record]
