"""The ground under every write: one writer at a time, a folder that nobody sees until it is done, and what the system refuses in one line.

Each staging folder is locked while it is needed, so what a dead writer left is told from what a live one still needs, and swept. A
name is no proof that minilora made a folder: an archive can hold any name, and a link to anywhere. So the name ends in the number that
the file system gave to that very folder, which nobody can know before it is made; what has another number is left alone.
Next file: ``files/parse.py``.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minilora.errors import WriteError
from minilora.files import disk

STAGED = ".minilora-new-"  # how the name of a staging folder begins
_FIRST_NAME = re.compile("[0-9a-f]{8}")  # behind the prefix, of a folder whose maker died before it knew the number
_PATIENCE = 60.0  # seconds that a writer waits for another one


@contextmanager
def staging(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``folder``, locked for as long as it is needed and removed after, as is what has changed places with it."""
    token = prefix + secrets.token_hex(4)
    with locked(folder):
        disk.used.make_folder(folder / token)
        try:
            staged = numbered(folder / token, folder / token)
        except OSError:
            with suppress(OSError):
                disk.used.remove_folder(folder / token)
            raise
        held = disk.used.lock(staged)
    try:
        yield staged
    finally:
        with suppress(OSError):
            for name in disk.used.names(folder):
                if name.startswith(token) and is_ours(folder / name, prefix):
                    disk.used.remove_tree(folder / name)
        if held is not None:
            held.close()


def numbered(staged: Path, folder: Path) -> Path:
    """Add the number of a folder to a staging folder's name, on the disk before anything may depend on it; the new path."""
    number = f"{disk.used.inode(folder):x}"
    if number in staged.name.split("-"):
        return staged
    named = staged.with_name(f"{staged.name}-{number}")
    disk.used.rename(staged, named)
    disk.used.flush(staged.parent)
    return named


def is_ours(path: Path, prefix: str) -> bool:
    """Whether minilora made this folder, here and on this disk: its number stands in its name."""
    if disk.used.kind(path) != "folder" or not path.name.startswith(prefix):
        return False
    return f"{disk.used.inode(path):x}" in path.name.removeprefix(prefix).split("-")[1:]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time, where folders can be locked."""
    deadline = time.monotonic() + _PATIENCE
    while (held := disk.used.lock(folder)) is None:
        if time.monotonic() > deadline:
            raise WriteError(f"{folder}: another process has been saving here for {_PATIENCE:.0f} s; end it first")
        time.sleep(0.005)
    try:
        yield
    finally:
        held.close()


def sweep(folder: Path, prefix: str) -> None:
    """Remove the staging folders of this prefix that no live writer holds."""
    for path in (folder / name for name in disk.used.names(folder) if name.startswith(prefix)):
        if disk.used.kind(path) == "folder" and (left := disk.used.lock(path)) is not None and left.taken:
            with suppress(OSError):
                if is_ours(path, prefix):
                    disk.used.remove_tree(path)
                elif _FIRST_NAME.fullmatch(path.name.removeprefix(prefix)):
                    disk.used.remove_folder(path)  # fails, as it should, if anything is in it
            left.close()


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
