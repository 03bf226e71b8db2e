"""Long work shows itself: a live line on a terminal (with rich where it is installed), plain lines when piped."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from minilora.errors import for_terminal

__all__ = ["Progress", "busy"]

_PLAIN_EVERY = 5.0  # seconds between lines when piped
_DOT_EVERY = 2.0  # seconds between the dots of a terminal without rich
_shown: ContextVar[Progress | None] = ContextVar("_shown", default=None)


@contextmanager
def busy(name: str, total: int = 0) -> Iterator[Callable[[], None]]:
    """Work that has no records, such as loading or an answer, as a bar of its own in the ``Progress`` that is shown; nothing without one.

    Args:
        name: what is done. total: how often the function that comes back will be called; 0 if that is not known.

    Yields:
        a function to call when a part is done.
    """
    progress = _shown.get()
    if progress is None:
        yield lambda: None
    else:
        with progress.busy(name, total) as tick:
            yield tick


class Progress:
    """Watches a training run; give its ``watch`` to ``train``. Use as a context manager.

    Args:
        steps: of the run; 0 where there is none, and only ``busy`` work is shown.
        stream: where to write; rich is used if it is a terminal and rich is installed.
    """

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self.steps, self.stream = steps, stream or sys.stdout
        self._said = 0.0
        self._from: tuple[int, float] | None = None  # step and seconds where the first one that was shown began
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            self._bar = _rich_bar(self.stream, transient=not self.steps)
        if self._bar is not None:
            self._bar.start()
            if self.steps:
                self.begin(self.steps)
        self._token = _shown.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _shown.reset(self._token)
        if self._bar is not None:
            self._bar.stop()

    def begin(self, steps: int) -> None:
        """The run will have so many steps."""
        self.steps = steps
        if self._bar is not None and self._task is None:
            self._task = self._bar.add_task("training", total=steps, figures="", left="left")
        elif self._bar is not None:
            self._bar.update(self._task, total=steps)

    @contextmanager
    def busy(self, name: str, total: int = 0) -> Iterator[Callable[[], None]]:
        """As the function of this name."""
        if self._bar is not None:
            task = self._bar.add_task(
                for_terminal(name, self.stream.encoding), total=total or None, figures="", left="left" * (total > 0)
            )
            try:
                yield lambda: self._bar.advance(task)
            finally:
                self._bar.remove_task(task)
        elif self.stream.isatty():
            with _dots(self.stream):
                yield lambda: None
        else:
            yield lambda: None

    def watch(self, record: dict[str, Any]) -> None:
        """Show one record of ``train``."""
        if "eval_loss" in record:
            sample = f"; {record['prompt']!r} -> {record['answer']!r}" if "prompt" in record else ""
            loss = "not finite" if record["eval_loss"] is None else f"{record['eval_loss']:.3f}"
            self.say(f"evaluation at step {record['step']}: loss {loss}{sample}")
            return
        if "skipped" in record:
            self.say(f"step {record['step']}/{self.steps} is skipped: {record['skipped']}")
            return
        step = record["step"]
        figures = f"loss {record['loss']:.3f}  {record['tokens_per_s']:.0f} tokens/s  {record['rss_mb']:.0f} MB"
        if "share_of_peak" in record:
            figures += f"  {record['share_of_peak']:.0%} of the GPU's peak"
        # What came before the first step, an evaluation or an earlier attempt, is no measure of the steps to come.
        if self._from is None:
            self._from = step - 1, record["seconds"] - record["tokens"] / record["tokens_per_s"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step in (1, self.steps) or time.monotonic() - self._said >= _PLAIN_EVERY:
            self._said = time.monotonic()
            begun, then = self._from
            left = (record["seconds"] - then) / (step - begun) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {figures}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """One line above the bar, or a plain line; what a model or a file says in it steers no terminal."""
        line = for_terminal(line, self.stream.encoding)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, emoji=False)
        else:
            print(line, file=self.stream, flush=True)


@contextmanager
def _dots(stream: TextIO) -> Iterator[None]:
    """A dot every two seconds while something is done, and a line end if there was any."""
    ended, some = threading.Event(), False

    def beat() -> None:
        nonlocal some
        while not ended.wait(_DOT_EVERY):
            some = True
            print(".", end="", file=stream, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if some:
            print(file=stream, flush=True)


def _rich_bar(stream: TextIO, transient: bool) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    left = TextColumn("{task.fields[left]}")  # behind the time; nothing where that is not known
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Bar(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), left, console=Console(file=stream), transient=transient
    )
