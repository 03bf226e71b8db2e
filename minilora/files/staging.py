"""The ground under every write: one writer at a time, a folder that nobody sees until it is done, and what the system refuses in one line.

Each staging folder is locked while it is needed, so what a dead writer left is told from what a live one still needs, and swept.
Next file: ``files/parse.py``.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minilora.errors import WriteError
from minilora.files import disk

STAGED = ".minilora-new-"  # how the name of a staging folder begins
_PATIENCE = 60.0  # seconds that a writer waits for another one


@contextmanager
def staging(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``folder``, locked for as long as it is needed and removed after."""
    with locked(folder):
        staged = folder / (prefix + secrets.token_hex(4))
        disk.used.make_folder(staged)
        handle = disk.used.lock(staged)
    try:
        yield staged
    finally:
        with suppress(OSError):
            remove_tree(staged)
        if handle is not None:
            disk.used.unlock(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time, where folders can be locked."""
    deadline = time.monotonic() + _PATIENCE
    while (handle := disk.used.lock(folder)) is None:
        if time.monotonic() > deadline:
            raise WriteError(f"{folder}: another process has been saving here for {_PATIENCE:.0f} s; end it first")
        time.sleep(0.005)
    try:
        yield
    finally:
        disk.used.unlock(handle)


def sweep(folder: Path, prefix: str) -> None:
    """Remove the staging folders of this prefix that no live writer holds."""
    for name in disk.used.names(folder):
        if name.startswith(prefix) and (left := disk.used.lock(folder / name)) not in (None, -1):
            with suppress(OSError):
                remove_tree(folder / name)
            disk.used.unlock(left)


def remove_tree(folder: Path) -> None:
    """A folder and all that is in it, if it is there. What resists is tried last, so that one bad file keeps no other."""
    if disk.used.kind(folder) is None:
        return
    failed: OSError | None = None
    for name in disk.used.names(folder):
        try:
            if disk.used.kind(folder / name) == "folder":
                remove_tree(folder / name)
            else:
                disk.used.unlink(folder / name)
        except OSError as error:
            failed = error
    if failed:
        raise failed
    disk.used.remove_folder(folder)


def settle(folder: Path, mode: int) -> None:
    """Flush everything in a folder that others filled, and give its files the mode that the umask means."""
    for name in disk.used.names(folder):
        path = folder / name
        if disk.used.kind(path) == "folder":
            settle(path, mode)
        elif disk.used.kind(path) == "file":
            disk.used.set_mode(path, mode)
            disk.used.flush(path)
    disk.used.flush(folder)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing, each brought to the disk."""
    if disk.used.kind(folder) is None and folder.parent != folder:
        make_folders(folder.parent)
        with suppress(FileExistsError):
            disk.used.make_folder(folder)
        disk.used.flush(folder.parent)
    elif disk.used.kind(folder) == "file":
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


@contextmanager
def told(place: Path, size: int) -> Iterator[None]:
    """Turn what the system says into a ``WriteError`` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        need = f" ({size:,} bytes)" if error.errno == errno.ENOSPC and size else ""
        reason = f"cannot be written ({error.strerror}); choose a writable folder with room{need}"
        raise WriteError(f"{error.filename or place}: {reason}") from None
