"""Work in a process of its own, and what a process holds in memory.

Memory is comparable only between fresh processes that give freed memory back at once; and a library that is measured must not share its
process with another. A ``Worker`` is the one side, ``serve`` the other; between them goes one JSON object a line. Memory is what is
anonymous (weights, activations; not program files): its high-water mark comes from Linux, exact, without sampling.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora import errors
from minilora.errors import MiniLoraError, StateError
from minilora.files.fresh import environment

__all__ = ["Worker", "anonymous_bytes", "can_measure", "peak_anonymous_bytes", "reset_peak", "serve"]

# Of glibc. To measure memory, larger blocks are mapped alone, and unmapped when they are freed. To be fast, what is freed stays: the
# first number is the largest that glibc takes.
_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
_FAST = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """``module:function`` in a fresh interpreter. Use as a context manager.

    Args:
        target: ``package.module:function``; the function gets ``settings`` and returns a callable that answers requests (a dict each).
        settings: what JSON can hold.
        threads: of torch and its libraries; 0 leaves them as they are.
        smaller: what to try if the system has killed it, most likely for want of memory.
        measured: memory that is freed goes back to the system at once, so that a peak is exact; False is faster.
    """

    def __init__(
        self,
        target: str,
        settings: dict[str, Any],
        threads: int = 0,
        smaller: str = "try a smaller --batch or --seq",
        measured: bool = True,
    ) -> None:
        self.target, self.smaller = target, smaller
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from minilora.measure.worker import serve; serve()", target],
            env=environment(threads, _QUIET | (_EXACT if measured else _FAST)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )
        self._send(settings)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            MiniLoraError: as the worker raised it; ``StateError`` for any other error, and if the process is gone.
        """
        self._send(request)
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise StateError(f"{self.target}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"], StateError)(answer["error"])
        return answer

    def kill(self) -> None:
        """End it at once, from any thread; who waits for an answer gets ``StateError``."""
        self._process.kill()

    def _send(self, value: Any) -> None:
        try:
            self._process.stdin.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise StateError(f"{self.target}: {self._last_words()}") from None

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        why = f"killed, most likely for want of memory; {self.smaller}" if code == -9 else f"exit code {code}"
        return f"its process ended ({why}){': ' + lines[-1] if lines else ''}"


def serve() -> None:
    """The worker's side: make what ``sys.argv[1]`` names, then answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not run into the answers
    module, _, function = sys.argv[1].partition(":")
    make: Callable[[Any], Callable[[str], dict[str, Any]]] | None = None
    handle: Callable[[str], dict[str, Any]] | None = None
    settings = json.loads(sys.stdin.readline() or "null")
    for line in sys.stdin:
        try:
            if handle is None:
                make = getattr(importlib.import_module(module), function)
                handle = make(settings)
            answer = handle(json.loads(line))
        except Exception as error:
            known = isinstance(error, MiniLoraError)
            words = str(error) if known else f"{module}: {type(error).__name__}: {error}"
            answer = {"kind": type(error).__name__ if known else "StateError", "error": " ".join(words.split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# ---- the memory of this process


def can_measure() -> bool:
    """Whether this system tells a process its high-water mark (Linux does)."""
    return os.access("/proc/self/clear_refs", os.W_OK) and "RssAnon" in _status()


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind, in bytes, after a garbage collection."""
    gc.collect()
    return _status()["RssAnon"]


def reset_peak() -> None:
    """Let the high-water mark start again from what is held now. Raises ``StateError`` where the system has none."""
    if not can_measure():
        raise StateError("peak memory can be measured on Linux only (it wants /proc/self/clear_refs)")
    Path("/proc/self/clear_refs").write_text("5")


def peak_anonymous_bytes() -> int:
    """The most anonymous memory since ``reset_peak``, in bytes (files mapped meanwhile would count; warm up first)."""
    status = _status()
    return status["VmHWM"] - status["RssFile"] - status.get("RssShmem", 0)


def _status() -> dict[str, int]:
    """The sizes in ``/proc/self/status``, in bytes; empty where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {
        name: int(rest.split()[0]) * 1024
        for line in lines
        for name, _, rest in [line.partition(":")]
        if rest.endswith(" kB")
    }
