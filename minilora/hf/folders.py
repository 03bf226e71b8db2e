"""A folder of model files that is there whole or not at all: transformers writes into a staging folder, ``io`` flushes and renames it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minilora.errors import CheckpointError, MiniLoraError, WriteError
from minilora.files.write import new_folder
from minilora.training.memory import is_out_of_memory

__all__ = ["in_new_folder", "read_config", "refuse_occupied", "unreadable"]


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


def unreadable(name: str, error: Exception) -> Exception:
    """What to raise for what transformers raised while it read model ``name``: of damaged files anything can come.

    A missing package and a want of memory are not the folder's fault, and are returned as they are.
    """
    if isinstance(error, (MiniLoraError, ImportError)) or is_out_of_memory(error):
        return error
    reason = next(iter(str(error).strip().splitlines()), "")
    if "ignore_mismatched_sizes" in reason:  # its report goes to a log that nobody may see
        reason = "its weights have other shapes than its config.json says"
    kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
    return CheckpointError(
        f"model {name!r}: {kind}{reason} (wanted a hub id, a folder saved by transformers, or 'smollm2')"
    )


def read_config(place: str, name: str) -> Any:
    """The config of the model in ``place``, a folder or hub id, without what it says of quantization; ``name`` is what messages call it.

    Raises:
        CheckpointError: there is none, or transformers does not know it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except Exception as error:
        raise unreadable(name, error) from None
    config.__dict__.pop("quantization_config", None)
    return config
