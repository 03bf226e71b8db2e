"""Ctrl-C and SIGTERM as a wish that a loop grants when it can: after its step. The second one is granted at once.

Next file: ``training/checkpoint.py``.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Wish", "caught"]

_DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Wish:
    """``signal`` is the number of the signal that came, or None."""

    signal: int | None = None

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"


@contextmanager
def caught(patient: bool = False) -> Iterator[Wish]:
    """Catch Ctrl-C and SIGTERM inside the block. A program's own handlers stay, and so does everything outside the main thread.

    ``patient``: of a process that torchrun started, which gets Ctrl-C from the terminal and again from torchrun; who does not want to wait
    for the step has torchrun's own time limit, 30 s.
    """
    wish = Wish()

    def handler(number: int, frame: FrameType | None) -> None:
        if wish.signal is not None and not patient:
            _end(number)
        wish.signal = wish.signal or number

    main = threading.current_thread() is threading.main_thread()
    taken = [number for number, default in _DEFAULTS.items() if main and signal.getsignal(number) == default]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield wish
    finally:
        for number in taken:
            signal.signal(number, _DEFAULTS[number])


def _end(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
