"""Every byte that reaches a disk goes through here: written beside its place, flushed, and renamed over it.

A reader therefore sees a file as it was or as it is, never half of one. Files that are already open elsewhere keep their content.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from minilora.errors import CheckpointError

__all__ = ["append_line", "read_bytes", "write_file", "write_files"]


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write several files of one folder (made if need be): all of them are on disk before the first takes its place.

    Raises:
        CheckpointError: the folder cannot be made or written; the message has the path and the system's reason. Old files stay.
    """
    place = Path(folder)
    staged: dict[Path, Path] = {}
    replaced: dict[Path, Path | None] = {}
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            staged[place / name] = _stage(place, name, content)
        for target, temporary in staged.items():
            replaced[target] = _keep(target)
            os.replace(temporary, target)
        _flush_folder(place)
    except OSError as error:
        _put_back(replaced, staged)
        reason = f"cannot be written ({error.strerror}); choose a writable folder with room"
        raise CheckpointError(f"{error.filename or place}: {reason}") from None
    finally:
        for path in (*staged.values(), *(old for old in replaced.values() if old)):
            path.unlink(missing_ok=True)


def _keep(target: Path) -> Path | None:
    """A second name for the file that is about to be replaced, or None if there is none."""
    if not target.exists():
        return None
    kept = target.with_name(f".{target.name}.old-{os.getpid()}")
    kept.unlink(missing_ok=True)
    os.link(target, kept)
    return kept


def _put_back(replaced: Mapping[Path, Path | None], staged: Mapping[Path, Path]) -> None:
    """After a failure: every file as it was."""
    for target, old in replaced.items():
        if staged[target].exists():  # it failed before this one took its place
            continue
        if old is None:
            target.unlink(missing_ok=True)
        else:
            os.rename(old, target)


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write one file atomically. Raises ``CheckpointError`` as ``write_files``."""
    target = Path(path)
    write_files(target.parent, {target.name: content.encode() if isinstance(content, str) else content})


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add one line to a log. A line is written at once, so a kill loses at most the last."""
    with open(path, "a", encoding="utf-8") as log:
        log.write(line + "\n")


def read_bytes(path: str | os.PathLike[str], purpose: str) -> bytes:
    """The whole file, read once. Raises ``CheckpointError`` naming the file and what it was wanted for."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {purpose} cannot be read ({error.strerror}); check the path") from None


def _stage(folder: Path, name: str, content: bytes) -> Path:
    """A flushed temporary file beside its place, with the permissions that a plainly opened file would have."""
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Path(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
