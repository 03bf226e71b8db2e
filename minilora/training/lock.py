"""One run in a folder at a time: a file in it that is locked while the run lives, and has the number of its process in it.

The system frees the lock when the process ends, however it does; what then lies there stops nobody. Next file: ``training/left.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import getpid
from pathlib import Path

from minilora.errors import CheckpointError, WriteError
from minilora.files import disk
from minilora.files.read import read_bytes, refuse_path
from minilora.files.staging import make_folders, told

__all__ = ["LOCK_FILE", "held", "refuse_held"]

LOCK_FILE = "run.lock"
_TRIES = 10


@contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a run's folder, made if need be, while the block runs; ``say`` gets a line where the system has no locks.

    Raises:
        CheckpointError: another run holds it, with the number of its process. WriteError: the folder cannot be written.
    """
    refuse_path(folder, WriteError)
    was_there = folder.exists()
    with told(folder, 0):
        make_folders(folder)
        for _ in range(_TRIES):
            lock = disk.used.hold(folder / LOCK_FILE, f"{getpid()}\n".encode())
            if lock is not None:
                break
            time.sleep(0.01)  # who only looks whether it is held, holds it for a moment
        else:
            raise _refusal(folder)
    if not lock.taken:
        say(f"{folder}: this system locks no files there, so nothing stops a second run in it; see that there is none")
    try:
        yield
    finally:
        with suppress(OSError):
            disk.used.unlink(folder / LOCK_FILE)
        lock.close()
        if not was_there:
            with suppress(OSError):  # something is in it: the run
                disk.used.remove_folder(folder)


def refuse_held(folder: Path) -> None:
    """Raise ``CheckpointError`` if a run holds the folder now."""
    if disk.used.kind(folder / LOCK_FILE) != "file":
        return
    with told(folder, 0):
        lock = disk.used.hold(folder / LOCK_FILE, b"")
    if lock is None:
        raise _refusal(folder)
    lock.close()


def _refusal(folder: Path) -> CheckpointError:
    number = ""
    with suppress(CheckpointError):
        number = read_bytes(folder / LOCK_FILE, "the lock of the run")[:20].decode("ascii", "replace").strip()
    who = f"process {number}" if number.isdecimal() else "another process"
    return CheckpointError(f"{folder}: {who} is training there now; wait for it, end it, or choose another folder")
