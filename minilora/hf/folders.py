"""A folder of model files that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError

__all__ = ["in_new_folder", "refuse_occupied"]


def refuse_occupied(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path. Raises ``CheckpointError`` if something is in it already, before any work is done."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not an empty folder; choose another --out, or remove it")
    return target


def in_new_folder(target: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary folder beside ``target``, then rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
