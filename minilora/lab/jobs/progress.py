"""A sweep shows itself: steps of all trials, which go and which have ended, the best loss so far, the time left.

It is the display of a run (``training/progress.py``) with other figures. Next file: ``lab/jobs/shown.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

from minilora.training.progress import Progress

__all__ = ["SweepProgress"]

_PLAIN_EVERY = 5.0  # seconds between lines where there is no bar


class SweepProgress(Progress):
    """Watches a sweep; give its ``note`` to ``sweep`` as ``watch``. Use as a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(1, stream)
        self.lengths: Mapping[str, int] = {}
        self.done: dict[str, int] = {}
        self.over: dict[str, str] = {}  # why, "" for those that came to their ends
        self.losses: dict[str, float] = {}  # the last evaluation of each, or the last step's where nothing is evaluated
        self.evaluated = False
        self.start: tuple[int, float] | None = None  # steps and seconds when the first record came
        self.said = 0.0

    def __enter__(self) -> SweepProgress:
        super().__enter__()
        return self

    def plan(self, lengths: Mapping[str, int]) -> None:
        """The trials by name, with the steps of each."""
        self.lengths, self.done = lengths, dict.fromkeys(lengths, 0)
        self.said = time.monotonic()
        self.begin(self.total)

    @property
    def total(self) -> int:
        """The steps of all trials; of one that ended, those that it did."""
        return sum(self.done[name] if name in self.over else steps for name, steps in self.lengths.items())

    @property
    def best(self) -> str:
        """The lowest loss, and whose it is."""
        if not self.losses:
            return ""
        name = min(self.losses, key=lambda one: self.losses[one])
        return f"best {self.losses[name]:.3f} ({name})"

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Show one record of a trial."""
        if self.start is None and "before" not in record:
            self.start = sum(self.done.values()), time.monotonic()
        self.done[name] = max(self.done[name], record["step"])
        if "ended" in record:
            self.over[name] = record["ended"]
            if record["ended"]:
                self.losses.pop(name, None)
        self._take_loss(name, record)
        self._show()

    def _take_loss(self, name: str, record: dict[str, Any]) -> None:
        if record["step"] == 0:  # of the bare model, which is no trial's
            return
        if "eval_loss" in record and not self.evaluated:
            self.evaluated, self.losses = True, {}
        loss = record.get("eval_loss" if self.evaluated else "loss")
        if loss is not None and not self.over.get(name):
            self.losses[name] = loss

    def _show(self) -> None:
        done, total = sum(self.done.values()), self.total
        failed = sum(bool(why) for why in self.over.values())
        going = len(self.lengths) - len(self.over)
        early = f" ({failed} early)" if failed else ""
        figures = f"{going} going, {len(self.over)} ended{early}  {self.best}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, figures=figures)
        elif done < total and time.monotonic() - self.said >= _PLAIN_EVERY:
            self.said = time.monotonic()
            self.say(f"step {done}/{total}  {figures}  {self._left(done, total)}".rstrip())

    def _left(self, done: int, total: int) -> str:
        if self.start is None or done <= self.start[0]:
            return ""
        pace = (time.monotonic() - self.start[1]) / (done - self.start[0])
        return f"{pace * (total - done):.0f} s left"
