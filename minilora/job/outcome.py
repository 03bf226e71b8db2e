"""What a fine-tuning job did: ``Outcome``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a job did: the records of ``train``, the answers ``{prompt, before, after}``, seconds by phase, and peak memory in MB."""

    records: list[dict[str, Any]]
    answers: list[dict[str, str]]
    seconds: Mapping[str, float]
    peak_mb: float
    folder: Path

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [record["loss"] for record in self.records if "loss" in record]
