"""Writing: all that minilora puts on a disk goes through here. A save is there whole or not at all, also after a kill or a power cut.

What is new is written and flushed in a staging folder first. Then, where a folder holds files only, a copy of it that has the new files
(and hard links to all others) changes places with it in one step. Where that cannot be (folders in it, other systems), the staging
folder is renamed to ``.minilora-commit-NUMBER`` inside it: from then on readers here take the files in it first, and they are linked into
their places; a writer that died is finished by the next. Files of others in the folder stay. Next file: ``files/staging.py``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from minilora.errors import WriteError
from minilora.files import disk
from minilora.files.read import COMMIT, commit_of, refuse_path
from minilora.files.staging import STAGED, locked, make_folders, numbered, settle, staging, sweep, told

__all__ = ["append_line", "new_file", "new_folder", "remove", "write_file", "write_files"]

_SPARE = ".spare-"  # in a commit folder: a second name of a file, on its way into its place
# What a system says that cannot exchange, or lets nobody write beside the folder.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS}
_CANNOT |= {errno.ENAMETOOLONG}  # a staging folder beside it is called as it is, and a little longer


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write several files of one folder (made if need be) as one step: readers see all old ones or all new ones.

    Raises:
        WriteError: the folder cannot be made or written; the message has the path and the system's reason. Old files stay.
    """
    place = _real(folder)
    with told(place, sum(map(len, files.values()))):
        make_folders(place.parent)
        _recover(place)
        if len(files) < 2 or not _may_exchange(place) or not _exchange(place, files):
            make_folders(place)
            _replace(place, files)


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write one file atomically. Raises ``WriteError`` as ``write_files``."""
    target = Path(path)
    refuse_path(target, WriteError)
    write_files(target.parent, {target.name: content.encode() if isinstance(content, str) else content})


def new_folder(folder: str | os.PathLike[str], fill: Callable[[Path], Any]) -> Path:
    """Let ``fill`` write into a staging folder, flush all of it, and give it the name of ``folder``, which is missing or empty.

    Raises:
        WriteError: as ``write_files``; nothing is left then. Whatever ``fill`` raises.
    """
    place = _real(folder)
    with told(place, 0):
        make_folders(place.parent)
        _recover(place)
        with staging(place.parent, f".{place.name}{STAGED}") as staged:
            fill(staged)
            settle(staged, staged.stat().st_mode & 0o666)
            with locked(place.parent):
                was_there = disk.used.kind(place) is not None
                if was_there:
                    disk.used.copy_mode(place, staged)
                disk.used.rename(staged, place)
                _flush_or(place.parent, lambda: _give_back(place, staged, was_there))
    return place


def new_file(path: str | os.PathLike[str], fill: Callable[[Path], Any]) -> Path:
    """Let ``fill`` write a file in a staging folder, flush it, and give it the name ``path``, which is not there yet.

    Raises:
        WriteError: as ``write_files``, or something of that name is there; nothing is left then. Whatever ``fill`` raises.
    """
    refuse_path(path, WriteError)
    place, name = _real(Path(path).parent), Path(path).name
    with told(place, 0):
        make_folders(place)
        _recover(place)
        with staging(place, STAGED) as staged:
            if disk.used.kind(place / name) is None:
                fill(staged / name)
                settle(staged, staged.stat().st_mode & 0o666)
            with locked(place):
                if disk.used.kind(place / name) is not None:
                    raise WriteError(f"{path}: exists; wanted the name of a new file")
                disk.used.rename(staged / name, place / name)
                _flush_or(place, lambda: disk.used.unlink(place / name))
    return place / name


def _give_back(place: Path, staged: Path, was_there: bool) -> None:
    disk.used.rename(place, staged)
    if was_there:
        disk.used.make_folder(place)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add one line to a log, at once and unflushed: a kill can halve it, a power cut lose the last lines. Raises as ``write_files``."""
    refuse_path(path, WriteError)
    with told(Path(path), len(line)):
        disk.used.append(path, f"{line}\n".encode())


def remove(folder: str | os.PathLike[str], names: Collection[str]) -> None:
    """Take files and whole folders out of a folder, each in one step, and what a killed ``remove`` left. Raises as ``write_files``."""
    place = _real(folder)
    if far := [name for name in names if Path(name).name != name or name in ("", "..")]:
        raise ValueError(f"{far[0]!r}: wanted the name of something in {place}, and no path")
    with told(place, 0):
        if disk.used.kind(place) is None:
            return
        _recover(place)
        if not names:
            return
        with staging(place, STAGED) as staged:
            for name in names:
                disk.used.rename(place / name, staged / name)
            disk.used.flush(place)


def _real(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, whatever links lead to it. Raises ``WriteError`` for what no folder can be called."""
    refuse_path(folder, WriteError)
    return Path(os.path.realpath(folder))


def _recover(place: Path) -> None:
    """Sweep what dead writers left beside a folder and in it, and finish what one of them had committed."""
    with suppress(OSError), locked(place.parent):
        sweep(place.parent, f".{place.name}{STAGED}")
    if disk.used.kind(place) == "folder":
        with locked(place):
            sweep(place, STAGED)
            _finish(place)


def _may_exchange(place: Path) -> bool:
    """Whether the folder may become another one of the same name: it holds no folder, and this process does not stand in it."""
    if disk.used.kind(place) is None:
        return True
    with suppress(FileNotFoundError):
        if os.path.realpath(os.getcwd()) == str(place):
            return False
    return all(disk.used.kind(place / name) != "folder" for name in disk.used.names(place))


def _exchange(place: Path, files: Mapping[str, bytes]) -> bool:
    """Put a folder with the new files and all others in the place of the old one; False if this system does not let us."""
    try:
        with staging(place.parent, f".{place.name}{STAGED}") as staged:
            if disk.used.kind(place) and disk.used.owner(staged) != disk.used.owner(place):
                return False
            for name, content in files.items():
                disk.used.write(staged / name, content)
            with locked(place.parent):
                return _swap(place, staged, files)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise


def _swap(place: Path, staged: Path, files: Mapping[str, bytes]) -> bool:
    if disk.used.kind(place) is None:
        disk.used.flush(staged)
        disk.used.rename(staged, place)
        _flush_or(place.parent, lambda: disk.used.rename(place, staged))
        return True
    for name in disk.used.names(place):
        if disk.used.kind(place / name) == "folder":
            return False
        if name not in files:
            disk.used.link(place / name, staged / name)
    disk.used.copy_mode(place, staged)
    disk.used.flush(staged)
    staged = numbered(staged, place)  # which will stand there
    disk.used.exchange(staged, place)
    _flush_or(place.parent, lambda: disk.used.exchange(staged, place))
    with suppress(OSError):  # the save is done
        _rescue(staged, place, files)
    return True


def _rescue(old: Path, place: Path, files: Mapping[str, bytes]) -> None:
    """What another program wrote into the old folder in the last moment moves over; the rest of it is removed by the caller."""
    for name in disk.used.names(old):
        if name not in files and disk.used.identity(old / name) != disk.used.identity(place / name):
            disk.used.rename(old / name, place / name)


def _replace(place: Path, files: Mapping[str, bytes]) -> None:
    """Put new files into a folder that stays the same one."""
    with staging(place, STAGED) as staged:
        for name, content in files.items():
            disk.used.write(staged / name, content)
        with locked(place):
            _finish(place)
            if len(files) == 1:
                _replace_one(place, staged, *files)
                return
            disk.used.flush(staged)
            commit = place / f"{COMMIT}{disk.used.inode(staged):x}"
            disk.used.rename(staged, commit)
            _flush_or(place, lambda: disk.used.rename(commit, staged))
            try:
                _finish(place)
            except OSError as error:
                raise WriteError(
                    f"{place}: is saved in {commit.name}, but its files are not all in place ({error.strerror}); save again to finish"
                ) from None


def _replace_one(place: Path, staged: Path, name: str) -> None:
    kept = staged / _SPARE
    if disk.used.kind(place / name):
        _copy(place / name, kept)
    disk.used.rename(staged / name, place / name)
    _flush_or(
        place, lambda: disk.used.rename(kept, place / name) if disk.used.kind(kept) else disk.used.unlink(place / name)
    )


def _finish(place: Path) -> None:
    """Bring the files of a commit, which may be a dead writer's, into their places. It can stop anywhere and be done again."""
    commit = commit_of(place)
    if commit is None:
        return
    for name in sorted(disk.used.names(commit), key=lambda name: not name.startswith(_SPARE)):  # spare ones first
        if name.startswith(_SPARE):
            disk.used.unlink(commit / name)
        elif disk.used.identity(place / name) != disk.used.identity(commit / name):
            spare = commit / (_SPARE + name)
            _copy(commit / name, spare)
            disk.used.rename(spare, place / name)
    disk.used.flush(place)
    disk.used.remove_tree(commit)
    disk.used.flush(place)


def _copy(source: Path, target: Path) -> None:
    """A second name, or where the file system has none, a second file."""
    try:
        disk.used.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        with closing(disk.used.open(source)) as file:
            disk.used.write(target, file.read())


def _flush_or(folder: Path, undo: Callable[[], None]) -> None:
    """Flush a folder in which a name has just changed; when that fails, change it back, if the disk still does anything."""
    try:
        disk.used.flush(folder)
    except OSError:
        with suppress(OSError):
            undo()
        raise
