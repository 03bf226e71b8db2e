"""Code that came with a model, run where it can be ended: in a copy of this process, which the system stops at a limit.

A chat template is a program. The sandbox that transformers runs it in keeps it from files and from Python, and lets it compute for ever:
``{% for i in range(99999) %}`` inside another one, or ``10 ** 10 ** 10``, which no exception and no other thread could stop. So templates
are rendered in a forked child, and what it renders comes back through a pipe.

What is bounded: the processor time of one rendering (``SECONDS``; waiting does not count, so a busy machine changes nothing), the memory
that a child may take beyond its parent's (``MEMORY``, where the system can say: Linux), and the length of what it returns. What is not:
the number of renderings, and anything at all where a process cannot be forked (Windows): there templates run unbounded in this process.
Next file: ``data/encoding.py``.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minilora.errors import DataError

try:
    import resource
except ImportError:  # pragma: no cover: Windows
    resource = None  # type: ignore[assignment]

__all__ = ["allow", "bounded"]

SECONDS = 5  # of processor time, for one rendering
MEMORY = 2_000_000_000  # bytes
LONGEST = 64_000_000  # letters of one result
_Work = Callable[[Any], Any]


def bounded(work: _Work, items: Iterable[Any]) -> Iterator[Any]:
    """``work`` of each item, in order: a JSON value each. Work calls ``allow`` before each of its renderings.

    Raises:
        DataError: work raised it, needed more than its share, or ended the child. Items after that are not worked on.
    """
    if resource is None or not hasattr(os, "fork"):  # pragma: no cover: Windows
        yield from map(work, items)
        return
    read, write = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover: another process
        _serve(work, items, read, write)
    os.close(write)
    whole = False
    try:
        with os.fdopen(read, "rb") as results:
            for line in results:
                value = json.loads(line)
                if "failed" in value:
                    raise DataError(value["failed"])
                yield value["done"]
        whole = True
    finally:
        if not whole:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise DataError(_reason(status))


def allow() -> None:
    """Begin the share of one rendering anew. Outside of a child, nothing."""
    if _in_child and resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


_in_child = False


def _serve(work: _Work, items: Iterable[Any], read: int, write: int) -> None:  # pragma: no cover: another process
    """The child's life: it never returns, and leaves without the parent's farewells."""
    global _in_child
    _in_child, code = True, 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):
                signal.signal(number, signal.SIG_DFL)
        os.close(read)
        _limit_memory()
        with os.fdopen(write, "wb") as results:
            for item in items:
                results.write(_answer(work, item))
                results.flush()
        code = 0
    except BaseException:
        pass
    finally:
        os._exit(code)


def _answer(work: _Work, item: Any) -> bytes:
    try:
        line = json.dumps({"done": work(item)})
    except DataError as error:
        line = json.dumps({"failed": str(error)})
    except MemoryError:
        line = json.dumps(
            {"failed": f"the chat template needs more than {MEMORY / 1e9:g} GB of memory; use another one"}
        )
    return f"{line}\n".encode()


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError, ValueError):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or now + MEMORY < hard:
            resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))


def _reason(status: int) -> str:
    if status == -signal.SIGXCPU:
        return f"the chat template does not end: stopped after {SECONDS} s; use another one"
    return f"the chat template ended its process ({status}); use another one"
