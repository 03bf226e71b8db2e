"""What a device holds for this process, and the most of it: anonymous memory of the process for a CPU, torch's own count for a CUDA GPU.

No GPU has run this yet. Next file: ``measure/worker.py``.
"""

from __future__ import annotations

import gc

import torch

from minilora.errors import StateError
from minilora.measure.worker import anonymous_bytes, can_measure, peak_anonymous_bytes, reset_peak

__all__ = ["Meter"]


class Meter:
    """One for each device; all sizes in bytes."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def works(self) -> bool:
        """Whether the peak can be read here."""
        return self.device.type == "cuda" or (self.device.type == "cpu" and can_measure())

    def held(self) -> int:
        """What is held now, after a garbage collection."""
        if self.device.type != "cuda":
            return anonymous_bytes()
        gc.collect()
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        """Let the peak start again from what is held now. Raises ``StateError`` where there is none to read."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            reset_peak()
        else:
            raise StateError(
                f"{self.device}: torch tells no peak memory of this device; plan with --device cpu, or --no-measure"
            )

    def peak(self) -> int:
        """The most that was held since ``reset``."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_anonymous_bytes()
