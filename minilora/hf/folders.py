"""A folder of model files that is there whole or not at all: transformers writes into a staging folder, ``io`` flushes and renames it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minilora.errors import CheckpointError, WriteError
from minilora.io import new_folder

__all__ = ["in_new_folder", "read_config", "refuse_occupied"]


def refuse_occupied(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path. Raises ``CheckpointError`` if something is in it already, before any work is done."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not an empty folder; choose another --out, or remove it")
    return target


def in_new_folder(target: Path, write: Callable[[Path], Any]) -> Path:
    """``write`` fills a staging folder, which then becomes ``target``. Raises ``WriteError``; nothing is left then."""
    try:
        return new_folder(target, write)
    except SafetensorError as error:  # its writer wraps what the system says
        raise WriteError(f"{target}: cannot be written ({error}); choose a writable folder with room") from None


def read_config(place: str, name: str) -> Any:
    """The config of the model in ``place``, a folder or hub id, without what it says of quantization; ``name`` is what messages call it.

    Raises:
        CheckpointError: there is none, or transformers does not know it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"model {name!r}: {reason} (wanted a hub id, a folder, or 'smollm2')") from None
    config.__dict__.pop("quantization_config", None)
    return config
