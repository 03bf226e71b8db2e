"""What a reader has done, in ``progress.json`` beside the reader's files: the grades, and the hash of the file that got them.

A file that is no longer the one that was graded is shown as changed since. Nothing here needs torch. Next file: ``learn/mutant.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.read import read_bytes, refuse_path
from minilora.files.write import write_file

__all__ = ["Progress", "place", "write_once"]

_FILE = "progress.json"


class Progress:
    """What is known of the files of one folder.

    Raises:
        CheckpointError: ``progress.json`` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / _FILE
        self._known: dict[str, Any] = {}
        if self._path.exists():
            try:
                self._known = json.loads(read_bytes(self._path, "what is done"))
            except (ValueError, RecursionError) as error:
                raise self._damaged(str(error)) from None
            if not isinstance(self._known, dict) or not all(map(_is_entry, self._known.values())):
                raise self._damaged("wanted an object with a hash and grades for each file")

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: is damaged ({why}); remove it, and minilora learn check writes it anew")

    def note(self, file: str, digest: str, right: Mapping[str, bool]) -> None:
        """Keep which functions of a file are right that had this ``digest``. Raises ``WriteError``."""
        self._known[file] = {"sha256": digest, "right": dict(right)}
        write_file(self._path, json.dumps(self._known, indent=1, sort_keys=True) + "\n")

    def is_done(self, file: str) -> bool:
        """Whether all functions of a file were right when it was graded."""
        entry = self._known.get(file)
        return entry is not None and all(entry["right"].values())

    def state(self, file: str, count: int) -> str:
        """A few words: what came of a file in which ``count`` functions are wanted; empty if it is not begun."""
        entry = self._known.get(file)
        if entry is None:
            return "begun" if (self.folder / file).is_file() else ""
        right = sum(entry["right"].values())
        said = "done" if self.is_done(file) else f"{right} of {count}"
        return said if entry["sha256"] == self.digest(file) else f"{said}, changed since"

    def digest(self, file: str) -> str:
        """The SHA-256 of a file as it is now; empty if it is not there."""
        path = self.folder / file
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "right"} or not isinstance(entry["right"], dict):
        return False
    return isinstance(entry["sha256"], str) and all(isinstance(value, bool) for value in entry["right"].values())


def place(folder: str) -> Path:
    """The reader's folder, which need not be there. Raises ``CheckpointError`` for what cannot be one."""
    found = Path(folder)
    refuse_path(found)
    if found.exists() and not found.is_dir():
        raise CheckpointError(f"{found}: is a file; wanted a folder, or the name of a new one")
    return found


def write_once(path: Path, text: str) -> bool:
    """Write a file that is not there yet; returns whether it was written. What is there is the reader's, and stays."""
    if path.is_symlink() or path.exists():
        return False
    write_file(path, text)
    return True
