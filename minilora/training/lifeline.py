"""How the processes of a run know of each other's end: signs of life, who failed and why, and that it is said once.

All of it goes over the store of the rendezvous, which needs no partner at the same place of the program: a process that fails is heard
wherever the others are, and each has a thread that listens. Next file: ``training/processes.py``.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from minilora.errors import MiniLoraError, TrainingError

__all__ = ["Elsewhere", "Lifeline"]

BEAT = 0.5  # seconds between two signs of life
SILENT, HURRIED = 60, 8  # beats without one after which a process is gone: in quiet times, and when a signal has come
GRACE = 10.0  # seconds that a process has to come to its end by itself when another one has failed
_LOST = "the connection to the first machine is lost, so its torchrun has ended"


class Elsewhere(TrainingError):
    """Another process has failed, and this one ends because of it."""


class Lifeline:
    """What one process knows of the others.

    Attributes:
        news: why the run cannot go on, once that is known.
        hurried: says whether a signal has come: torchrun sends one to all when one has died, so a silent one is given up sooner.
        last_words: called, in a thread, before this process is ended where it waits for one that will not come: saves what is good.
    """

    def __init__(self, store: Any, rank: int, size: int, local: int) -> None:
        self.store, self.rank, self.size, self.local = store, rank, size, local
        self.news: str | None = None
        self.hurried: Callable[[], bool] = lambda: False
        self.last_words: Callable[[], object] = lambda: None
        self._ending, self._over = threading.Event(), threading.Event()
        store.set(f"alive/{rank}", "0")
        threading.Thread(target=self._listen, args=(store.clone(),), daemon=True).start()

    def name(self, rank: int) -> str:
        """As messages call a process."""
        return f"process {rank} of {self.size}"

    def close(self) -> None:
        """Nothing is listened for or said any more."""
        self._over.set()

    # ---- the thread

    def _listen(self, store: Any) -> None:
        """Give signs of life, look for those of the others, and for who has failed."""
        keys = [f"alive/{rank}" for rank in range(self.size)]
        heard, silent, beat = [b""] * self.size, [0] * self.size, 0
        while not self._over.wait(BEAT):
            beat += 1  # counted, not timed: a group that was stopped as a whole has missed nothing
            try:
                store.set(keys[self.rank], str(beat))
                if not store.check(keys):
                    continue  # one has not begun yet
                now = store.multi_get(keys)
                failed = json.loads(store.get("failed")) if store.check(["failed"]) else None
            except RuntimeError:
                self._learn(_LOST)
                return
            silent = [0 if new != old else count + 1 for new, old, count in zip(now, heard, silent, strict=True)]
            heard, most = now, HURRIED if self.hurried() else SILENT
            gone = next((rank for rank in range(self.size) if silent[rank] > most and rank != self.rank), None)
            if failed is not None:
                self._learn(failed)
            elif gone is not None:
                self._learn(f"{self.name(gone)} is gone: no sign of life for {most * BEAT:.0f} s")

    def _learn(self, text: str) -> None:
        if self.news is None:
            self.news = text
            threading.Thread(target=self._give_up, daemon=True).start()

    def _give_up(self) -> None:
        """End this process where its main thread is held up, in a load or in an exchange, and does not come to its end."""
        if not self._ending.wait(GRACE) and not self._over.is_set():
            words = threading.Thread(target=self.last_words, daemon=True)
            words.start()
            words.join(GRACE)  # a GPU that waits may hold it up, too
            if self._is_chosen():
                os.write(2, f"minilora: {self.news}\n".encode())
            os._exit(1)

    def refuse_broken(self, error: RuntimeError) -> None:
        """Raise ``Elsewhere`` for the error of an exchange with a process that is not there any more, once that is known."""
        said = str(error).lower()
        if not any(word in said for word in ("gloo", "nccl", "connection")):
            return
        until = time.monotonic() + BEAT * (SILENT + 4)
        while self.news is None and time.monotonic() < until:
            time.sleep(BEAT / 5)
        if self.news is not None:
            raise Elsewhere(self.news)

    # ---- the end

    def reason(self, error: Exception) -> Exception:
        """What to raise where this process cannot go on: the reason of the whole run; ``told`` on all but the one that says it.

        It is what all say alike, or what the first that failed says, with its name. SIGTERM is ignored from here on: torchrun sends it as
        soon as one process has left, and the reason must still be printed.
        """
        self._ending.set()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        known = isinstance(error, MiniLoraError)
        if not known and isinstance(error, RuntimeError):
            try:
                self.refuse_broken(error)
            except Elsewhere as found_out:
                error, known = found_out, True
        text = str(error) if known else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store is gone: each says what it knows
            text = self._verdict(text, isinstance(error, Elsewhere))
        found = error if isinstance(error, MiniLoraError) else Elsewhere(text)
        found.args, found.told = (text,), not self._may_speak()
        return found

    def _verdict(self, text: str, elsewhere: bool) -> str:
        store, keys = self.store, [f"end/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], text)
        if not elsewhere:
            store.compare_set("failed", "", json.dumps(f"{self.name(self.rank)}: {text}"))
        until = time.monotonic() + 4 * BEAT
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.02)
        if store.check(keys) and all(said == text.encode() for said in store.multi_get(keys)):
            return text
        return json.loads(store.get("failed")) if store.check(["failed"]) else text

    def _may_speak(self) -> bool:
        """The first process speaks; another one does where nobody has after a while."""
        until = time.monotonic() + (0 if self.rank == 0 else 1.5 * GRACE)
        with suppress(RuntimeError):
            while time.monotonic() < until and not self.store.check(["said"]):
                time.sleep(0.05)
        return self._is_chosen()

    def _is_chosen(self) -> bool:
        try:
            return self.store.add("said", 1) == 1
        except RuntimeError:
            return self.local == 0
