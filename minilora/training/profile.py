"""A trace of a few steps: what torch computed when, for how long and with how much memory, by torch's profiler.

``trace.json`` in the run folder opens in Perfetto (https://ui.perfetto.dev). The first step of a process is left out where there are
others, because it also fills caches. Next file: ``training/loop.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minilora.files.write import write_file

__all__ = ["TRACE_FILE", "Profile"]

TRACE_FILE = "trace.json"


class Profile:
    """Records some steps of a run; a context around them, at whose end, whatever ends it, the trace is written.

    Args:
        folder: of the run. steps: that are recorded; 0 is none. left: steps that the run still takes.
    """

    def __init__(self, folder: Path, steps: int, left: int) -> None:
        self.folder, self.wanted = folder, min(steps, max(1, left - 1))
        self.passed = 0 if left > 1 else 1  # steps since the start; with one step only there is nothing to leave out
        self.recorded = 0
        self._recorder: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step of the run, the ``number``-th."""
        if self.recorded == self.wanted or not self.passed:
            self.passed += 1
            yield
            return
        if self._recorder is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._recorder = torch.profiler.profile(activities=kinds, profile_memory=True)
            self._recorder.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self.recorded += 1
        if self.recorded == self.wanted:
            self._write()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def _write(self) -> None:
        """Write what was recorded, if it is not written yet."""
        recorder, self._recorder, self.wanted = self._recorder, None, self.recorded
        if recorder is None:
            return
        recorder.stop()
        if not self.recorded:
            return
        with tempfile.TemporaryDirectory(prefix="minilora-trace-") as own:
            path = Path(own) / TRACE_FILE
            recorder.export_chrome_trace(str(path))
            write_file(self.folder / TRACE_FILE, path.read_bytes())
