"""A sweep shared out among processes of this computer: which trials each has, how it is started, and what it says.

A worker is a fresh interpreter that sweeps its trials in a folder of its own (``serve``). Its standard input is its lifeline: when that
ends, by the wish of the first process or by its death, the worker saves after its step and ends. Next file: ``lab/jobs/shared.py``.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from minilora.errors import Interrupted, MiniLoraError
from minilora.files.fresh import environment
from minilora.lab.jobs.job import SweepJob, look, run_here
from minilora.lab.sweeps.trial import Trial

__all__ = ["Worker", "serve", "shares_of"]

_ALIKE = (
    "seed",
    "batch_size",
    "accumulate",
)  # trials that are alike in these meet the same batches, so they share calls without padding


def shares_of(trials: Sequence[Trial], count: int) -> list[list[str]]:
    """The names of the trials that each of ``count`` workers has: about equally many examples, and those together that share batches."""
    order = sorted(range(len(trials)), key=lambda at: (*(getattr(trials[at].train, name) for name in _ALIKE), at))
    costs = [trials[at].train.steps * trials[at].train.batch_size * trials[at].train.accumulate for at in order]
    cuts, done = [0], 0
    for number, cost in enumerate(costs):
        left = count - len(cuts)  # cuts that are still to be made
        if left and (done + cost / 2 > sum(costs) * len(cuts) / count or len(costs) - number <= left) and number:
            cuts.append(number)
        done += cost
    return [[trials[at].name for at in sorted(order[first:end])] for first, end in pairwise([*cuts, len(order)])]


class Worker:
    """One process.

    Args:
        number: from 1. asked: its part of the sweep. threads: of torch and its libraries. before: called first, to load plugins.
        heard: gets ``(number, message)`` for everything that it says, and ``(number, None)`` at its end.
    """

    def __init__(
        self,
        number: int,
        asked: SweepJob,
        threads: int,
        before: Callable[[], object] | None,
        heard: queue.Queue[tuple[int, dict[str, Any] | None]],
    ) -> None:
        self.number, self.asked, self.done, self.stopped = number, asked, False, False
        self.error: tuple[str, str] | None = None  # its class and its line
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from minilora.lab.jobs.workers import serve; serve()"],
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,  # Ctrl-C of the terminal reaches the first process alone, which passes it on
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(pickle.dumps((before, asked)))
            self._process.stdin.flush()
        self._ear = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._ear.start()

    @property
    def called(self) -> str:
        """Its number, and whose work it does."""
        names = [trial.name for trial in self.asked.trials]
        return f"worker {self.number} ({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"

    def _listen(self, heard: queue.Queue[tuple[int, dict[str, Any] | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # a line that a kill has halved
                heard.put((self.number, json.loads(line)))
        heard.put((self.number, None))

    def stop(self) -> None:
        """Let it save after its step, and end."""
        self.stopped = True
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def close(self) -> str:
        """Its last words, after it has ended; it is killed if it has not."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5 if self.done or self.stopped else 0.5)
        self._process.kill()
        code = self._process.wait()
        self._ear.join()
        self._process.stdout.close()  # type: ignore[union-attr]
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        if self._words.closed:
            return ""
        self._words.seek(0)
        lines = self._words.read().strip().splitlines()
        self._words.close()
        why = f"it was ended by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{why}{': ' + lines[-1] if lines and code > 0 else ''}"


def serve() -> None:
    """The worker's side: sweep what standard input says; a JSON object a line says what happens."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not run into the answers
    before, asked = pickle.load(sys.stdin.buffer)  # from the process that started this one
    threading.Thread(target=_hold_on, daemon=True).start()

    def tell(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        if before is not None:
            before()
        ready = look(asked, lambda line: None)
        run_here(ready, lambda line: tell(say=line), lambda name, record: tell(of=name, record=record), True)
        tell(done=True)
    except Interrupted as error:
        tell(interrupted=str(error))
    except Exception as error:
        known = isinstance(error, MiniLoraError)
        words = str(error) if known else f"{type(error).__name__}: {error}"
        tell(error=[type(error).__name__ if known else "TrainingError", " ".join(words.split())])


def _hold_on() -> None:
    """Wish for an end when the first process wants it or is gone."""
    while os.read(0, 4096):
        pass
    signal.raise_signal(signal.SIGTERM)
