"""Every byte that minilora puts on a disk goes through here: a save is there whole or not at all, also after a kill or a power cut.

What is new is written and flushed in a staging folder first. Then, where a folder holds files only, a copy of it that has the new files
(and hard links to all others) changes places with it in one step. Where that cannot be (folders in it, other systems), the staging
folder is renamed to ``.minilora-commit`` inside it: from then on readers here take the files in it first, and they are linked into
their places; a writer that died is finished by the next. Writers hold a lock on the folder, so what a dead one left is told from what a
live one still needs, and swept. Files of others in the folder stay. Next file: ``files/parse.py``.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, WriteError
from minilora.files.disk import Disk

__all__ = ["append_line", "new_folder", "read_bytes", "read_files", "remove", "write_file", "write_files"]

disk = Disk()
COMMIT = ".minilora-commit"
_STAGED = ".minilora-new-"
_SPARE = ".spare-"  # in a commit folder: a second name of a file, on its way into its place
_PATIENCE = 60.0  # seconds that a writer waits for another one
_TRIES = 200  # of a reader beside a writer
# What a system says that cannot exchange, or lets nobody write beside the folder.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS}

# ---- writing


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write several files of one folder (made if need be) as one step: readers see all old ones or all new ones.

    Raises:
        WriteError: the folder cannot be made or written; the message has the path and the system's reason. Old files stay.
    """
    place = Path(os.path.realpath(folder))
    with _told(place, sum(map(len, files.values()))):
        _make_folders(place.parent)
        _recover(place)
        if len(files) < 2 or not _may_exchange(place) or not _exchange(place, files):
            _make_folders(place)
            _replace(place, files)


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write one file atomically. Raises ``WriteError`` as ``write_files``."""
    target = Path(path)
    write_files(target.parent, {target.name: content.encode() if isinstance(content, str) else content})


def new_folder(folder: str | os.PathLike[str], fill: Callable[[Path], Any]) -> Path:
    """Let ``fill`` write into a staging folder, flush all of it, and give it the name of ``folder``, which is missing or empty.

    Raises:
        WriteError: as ``write_files``; nothing is left then. Whatever ``fill`` raises.
    """
    place = Path(os.path.realpath(folder))
    with _told(place, 0):
        _make_folders(place.parent)
        _recover(place)
        with _staging(place.parent, f".{place.name}{_STAGED}") as staged:
            fill(staged)
            _settle(staged, staged.stat().st_mode & 0o666)
            with _locked(place.parent):
                was_there = disk.kind(place) is not None
                if was_there:
                    disk.copy_mode(place, staged)
                disk.rename(staged, place)
                _flush_or(place.parent, lambda: _give_back(place, staged, was_there))
    return place


def _give_back(place: Path, staged: Path, was_there: bool) -> None:
    disk.rename(place, staged)
    if was_there:
        disk.make_folder(place)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add one line to a log, at once and unflushed: a kill can halve it, a power cut lose the last lines. Raises as ``write_files``."""
    with _told(Path(path), len(line)):
        disk.append(path, f"{line}\n".encode())


def _recover(place: Path) -> None:
    """Sweep what dead writers left beside a folder and in it, and finish what one of them had committed."""
    with suppress(OSError), _locked(place.parent):
        _sweep(place.parent, f".{place.name}{_STAGED}")
    if disk.kind(place) == "folder":
        with _locked(place):
            _sweep(place, _STAGED)
            _finish(place)


def _sweep(folder: Path, prefix: str) -> None:
    for name in disk.names(folder):
        if name.startswith(prefix) and (left := disk.lock(folder / name)) not in (None, -1):
            with suppress(OSError):
                _remove(folder / name)
            disk.unlock(left)


def remove(folder: str | os.PathLike[str], names: Collection[str]) -> None:
    """Take files and whole folders out of a folder, each in one step, and what a killed ``remove`` left. Raises as ``write_files``."""
    place = Path(os.path.realpath(folder))
    with _told(place, 0):
        if disk.kind(place) is None:
            return
        _recover(place)
        if not names:
            return
        with _staging(place, _STAGED) as staged:
            for name in names:
                disk.rename(place / name, staged / name)
            disk.flush(place)


def _may_exchange(place: Path) -> bool:
    """Whether the folder may become another one of the same name: it holds no folder, and this process does not stand in it."""
    if disk.kind(place) is None:
        return True
    with suppress(FileNotFoundError):
        if os.path.realpath(os.getcwd()) == str(place):
            return False
    return all(disk.kind(place / name) != "folder" for name in disk.names(place))


def _exchange(place: Path, files: Mapping[str, bytes]) -> bool:
    """Put a folder with the new files and all others in the place of the old one; False if this system does not let us."""
    try:
        with _staging(place.parent, f".{place.name}{_STAGED}") as staged:
            if disk.kind(place) and disk.owner(staged) != disk.owner(place):
                return False
            for name, content in files.items():
                disk.write(staged / name, content)
            with _locked(place.parent):
                return _swap(place, staged, files)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise


def _swap(place: Path, staged: Path, files: Mapping[str, bytes]) -> bool:
    if disk.kind(place) is None:
        disk.flush(staged)
        disk.rename(staged, place)
        _flush_or(place.parent, lambda: disk.rename(place, staged))
        return True
    for name in disk.names(place):
        if disk.kind(place / name) == "folder":
            return False
        if name not in files:
            disk.link(place / name, staged / name)
    disk.copy_mode(place, staged)
    disk.flush(staged)
    disk.exchange(staged, place)
    _flush_or(place.parent, lambda: disk.exchange(staged, place))
    with suppress(OSError):  # the save is done
        _rescue(staged, place, files)
    return True


def _rescue(old: Path, place: Path, files: Mapping[str, bytes]) -> None:
    """What another program wrote into the old folder in the last moment moves over; the rest of it is removed by the caller."""
    for name in disk.names(old):
        if name not in files and disk.identity(old / name) != disk.identity(place / name):
            disk.rename(old / name, place / name)


def _replace(place: Path, files: Mapping[str, bytes]) -> None:
    """Put new files into a folder that stays the same one."""
    with _staging(place, _STAGED) as staged:
        for name, content in files.items():
            disk.write(staged / name, content)
        with _locked(place):
            _finish(place)
            if len(files) == 1:
                _replace_one(place, staged, *files)
                return
            disk.flush(staged)
            disk.rename(staged, place / COMMIT)
            _flush_or(place, lambda: disk.rename(place / COMMIT, staged))
            try:
                _finish(place)
            except OSError as error:
                raise WriteError(
                    f"{place}: is saved in {COMMIT}, but its files are not all in place ({error.strerror}); save again to finish"
                ) from None


def _replace_one(place: Path, staged: Path, name: str) -> None:
    kept = staged / _SPARE
    if disk.kind(place / name):
        _copy(place / name, kept)
    disk.rename(staged / name, place / name)
    _flush_or(place, lambda: disk.rename(kept, place / name) if disk.kind(kept) else disk.unlink(place / name))


def _finish(place: Path) -> None:
    """Bring the files of a commit, which may be a dead writer's, into their places. It can stop anywhere and be done again."""
    commit = place / COMMIT
    if disk.kind(commit) != "folder":
        return
    for name in sorted(disk.names(commit), key=lambda name: not name.startswith(_SPARE)):  # spare ones first
        if name.startswith(_SPARE):
            disk.unlink(commit / name)
        elif disk.identity(place / name) != disk.identity(commit / name):
            spare = commit / (_SPARE + name)
            _copy(commit / name, spare)
            disk.rename(spare, place / name)
    disk.flush(place)
    _remove(commit)
    disk.flush(place)


def _copy(source: Path, target: Path) -> None:
    """A second name, or where the file system has none, a second file."""
    try:
        disk.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        with _open(source) as file:
            disk.write(target, file.read())


def _flush_or(folder: Path, undo: Callable[[], None]) -> None:
    """Flush a folder in which a name has just changed; when that fails, change it back, if the disk still does anything."""
    try:
        disk.flush(folder)
    except OSError:
        with suppress(OSError):
            undo()
        raise


# ---- staging


@contextmanager
def _staging(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``folder``, locked for as long as it is needed and removed after."""
    with _locked(folder):
        staged = folder / (prefix + secrets.token_hex(4))
        disk.make_folder(staged)
        handle = disk.lock(staged)
    try:
        yield staged
    finally:
        with suppress(OSError):
            _remove(staged)
        if handle is not None:
            disk.unlock(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, where folders can be locked."""
    deadline = time.monotonic() + _PATIENCE
    while (handle := disk.lock(folder)) is None:
        if time.monotonic() > deadline:
            raise WriteError(f"{folder}: another process has been saving here for {_PATIENCE:.0f} s; end it first")
        time.sleep(0.005)
    try:
        yield
    finally:
        disk.unlock(handle)


def _remove(folder: Path) -> None:
    """A folder and all that is in it, if it is there. What resists is tried last, so that one bad file keeps no other."""
    if disk.kind(folder) is None:
        return
    failed: OSError | None = None
    for name in disk.names(folder):
        try:
            if disk.kind(folder / name) == "folder":
                _remove(folder / name)
            else:
                disk.unlink(folder / name)
        except OSError as error:
            failed = error
    if failed:
        raise failed
    disk.remove_folder(folder)


def _settle(folder: Path, mode: int) -> None:
    """Flush everything in a folder that others filled, and give its files the mode that the umask means."""
    for name in disk.names(folder):
        path = folder / name
        if disk.kind(path) == "folder":
            _settle(path, mode)
        elif disk.kind(path) == "file":
            disk.set_mode(path, mode)
            disk.flush(path)
    disk.flush(folder)


def _make_folders(folder: Path) -> None:
    if disk.kind(folder) is None and folder.parent != folder:
        _make_folders(folder.parent)
        with suppress(FileExistsError):
            disk.make_folder(folder)
        disk.flush(folder.parent)
    elif disk.kind(folder) == "file":
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


@contextmanager
def _told(place: Path, size: int) -> Iterator[None]:
    """Turn what the system says into a ``WriteError`` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        need = f" ({size:,} bytes)" if error.errno == errno.ENOSPC and size else ""
        reason = f"cannot be written ({error.strerror}); choose a writable folder with room{need}"
        raise WriteError(f"{error.filename or place}: {reason}") from None


# ---- reading


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
            for name, purpose in wanted.items():
                try:
                    opened[name] = stack.enter_context(_open(_current(place, name)))
                except FileNotFoundError:
                    pass  # missing, or moved just now
                except OSError as error:
                    raise _unread(place / name, purpose, error) from None
            try:
                contents = {name: file.read() for name, file in opened.items()}
            except OSError as error:
                raise _unread(place, "a file in it", error) from None
            # Open files keep their numbers, so equal ones mean that nothing was exchanged in between.
            now = {name: disk.identity(_current(place, name)) for name in wanted}
            if now == {name: opened[name].identity if name in opened else None for name in wanted}:
                break
        time.sleep(0.002)
    else:
        raise CheckpointError(f"{place}: is rewritten all the time, so it cannot be read; wait for its writer to end")
    for name in wanted:
        if name not in contents and name not in optional:
            raise _unread(place / name, wanted[name], FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    return contents


def _current(place: Path, name: str) -> Path:
    """Where a file is: in a commit that is not finished, or in its place."""
    pending = place / COMMIT / name
    return pending if disk.identity(pending) else place / name


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    file = disk.open(path)
    try:
        yield file
    finally:
        file.close()


def _unread(path: Path, purpose: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: {purpose} cannot be read ({error.strerror}); check the path")
