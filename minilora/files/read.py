"""Reading: all files of a folder as they were at one moment, also beside a writer and after one that died.

A writer that could not change the whole folder in one step leaves what it committed in a folder ``.minilora-commit-NUMBER`` until all of
it is in place (``files/write.py``), so a file there counts before the one of its name. NUMBER is what the file system gave to that
very folder: a copy of one, or one that came in an archive, means nothing. Next file: ``files/write.py``.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from minilora.errors import CheckpointError, MiniLoraError
from minilora.files import disk

__all__ = ["current", "read_bytes", "read_files", "refuse_path"]

COMMIT = ".minilora-commit-"
_TRIES = 200  # beside a writer


def refuse_path(path: str | os.PathLike[str], kind: type[MiniLoraError] = CheckpointError) -> None:
    """Raise ``kind`` for what no file of this system can be called (too long, NUL in it, no bytes for it), or nobody may look for."""
    try:
        disk.used.kind(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(
            f"{os.fspath(path)[:200]}: is no path that can be used here ({reason}); choose another one"
        ) from None


def read_bytes(path: str | os.PathLike[str], purpose: str) -> bytearray:
    """The whole file, read once. Raises ``CheckpointError`` naming the file and what it was wanted for."""
    target = Path(path)
    return read_files(target.parent, {target.name: purpose})[target.name]


def read_files(
    folder: str | os.PathLike[str], wanted: Mapping[str, str], optional: Collection[str] = ()
) -> dict[str, bytearray]:
    """Files of one folder as they were at one moment, each read once: beside a writer it is tried again.

    Args:
        wanted: file name to what it is wanted for, which a message says. optional: names that may be missing.

    Raises:
        CheckpointError: a file is missing or cannot be read, by name.
    """
    place = Path(folder)
    for _ in range(_TRIES):
        with ExitStack() as stack:
            opened = {}
            for name, path in current(place, wanted).items():
                try:
                    opened[name] = stack.enter_context(closing(disk.used.open(path)))
                except FileNotFoundError:
                    pass  # missing, or moved just now
                except OSError as error:
                    raise _unread(place / name, wanted[name], error) from None
            try:
                contents = {name: file.read() for name, file in opened.items()}
            except OSError as error:
                raise _unread(place, "a file in it", error) from None
            # Open files keep their numbers, so equal ones mean that nothing was exchanged in between.
            now = {name: disk.used.identity(path) for name, path in current(place, wanted).items()}
            if now == {name: opened[name].identity if name in opened else None for name in wanted}:
                break
        time.sleep(0.002)
    else:
        raise CheckpointError(f"{place}: is rewritten all the time, so it cannot be read; wait for its writer to end")
    for name in wanted:
        if name not in contents and name not in optional:
            raise _unread(place / name, wanted[name], FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    return contents


def commit_of(place: Path) -> Path | None:
    """The commit in a folder that a writer, dead or alive, has not finished."""
    for path in (place / name for name in disk.used.names(place) if name.startswith(COMMIT)):
        with suppress(FileNotFoundError):  # finished meanwhile
            if disk.used.kind(path) == "folder" and path.name == f"{COMMIT}{disk.used.inode(path):x}":
                return path
    return None


def current(place: Path, names: Collection[str]) -> dict[str, Path]:
    """Where each file is: in a commit that is not finished, or in its place."""
    try:
        commit = commit_of(place)
    except OSError:  # no such folder, or one whose names nobody may list
        commit = None
    return {name: commit / name if commit and disk.used.identity(commit / name) else place / name for name in names}


def _unread(path: Path, purpose: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: {purpose} cannot be read ({error.strerror}); check the path")
