"""What ``minilora doctor`` finds: one sentence each, with how bad it is and the way out. Next file: ``doctor/place.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FAULT", "NOTE", "SEVERITIES", "WARNING", "Finding", "named"]

FAULT = "fault"  # wrong wherever the adapter is used
WARNING = "warning"  # wrong in some program, or likely not what was meant
NOTE = "note"  # right, and good to know
SEVERITIES = (FAULT, WARNING, NOTE)
_SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: one of SEVERITIES. check: which check found it, a name that stays. said: what is so, and what it means. way: what to do.
    """

    severity: str
    check: str
    said: str
    way: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.said}; {self.way}"


def named(names: Sequence[str]) -> str:
    """Some names for a sentence: the first three, and how many more there are."""
    shown = ", ".join(name[:200] for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else shown
