"""How much memory a run takes, and whether an error means that there was none left. Next file: ``training/loop.py``."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["is_out_of_memory", "memory_mb", "new_peak"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.M)


def memory_mb(peak: bool = False) -> float:
    """Memory of this process in MB (1e6 bytes): resident now, or its peak since ``new_peak`` or its start; of the GPU when one is in use.

    0 where the system does not say it (Windows).
    """
    if _on_gpu():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    try:
        import resource
    except ImportError:  # pragma: no cover: Windows
        return 0.0
    if peak and _STATUS.exists() and (told := _HIGH_WATER.search(_STATUS.read_text(encoding="utf-8"))):
        return int(told[1]) * 1024 / 1e6
    if peak or not Path("/proc/self/statm").exists():
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def new_peak() -> None:
    """Let the peak begin again at what is held now, where the system can (Linux, and torch on a GPU); elsewhere it stays that of all."""
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        if _RESET.exists():
            _RESET.write_text("5")


def _on_gpu() -> bool:
    """Whether this process holds or held memory there: a run on the CPU of a computer with a GPU may have woken it only."""
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no: torch has a type for it on a GPU, and only words on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
