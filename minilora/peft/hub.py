"""Adapters on the Hugging Face Hub: found by id, fetched into the cache, uploaded. All of it is ``huggingface_hub``'s work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.hub import FETCH, fetched, upload
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE

__all__ = ["folder_of", "name_of", "push"]

# What PEFT's loaders take for other kinds of storage and mean nothing where an adapter is made on its layer's device.
_IDLE = (
    "torch_device",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_dir",
    "offload_index",
    "torch_dtype",
    "use_safetensors",
)


def folder_of(model_id: str | os.PathLike[str], where: dict[str, Any]) -> Path:
    """The folder of an adapter: a path as it is, an id on the Hub fetched into the cache.

    Args:
        where: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``force_download``, ``local_files_only``.

    Raises:
        CheckpointError: an argument that no loader has, or an id that cannot be fetched. MissingPackageError: no ``huggingface_hub``.
    """
    known = dict(where)
    subfolder = known.pop("subfolder", None) or ""
    for name in _IDLE:
        known.pop(name, None)
    if strange := sorted(known.keys() - set(FETCH)):
        raise CheckpointError(
            f"{strange[0]}=: no argument of a loader; wanted one of {', '.join(('subfolder', *FETCH))}"
        )
    return fetched(
        model_id, subfolder, (CONFIG_FILE, WEIGHTS_FILE), (SEAL_FILE,), known
    )  # PEFT's adapters have no seal


def name_of(model: Any) -> str | None:
    """The name or folder that a model was loaded from; None if it does not say."""
    own = vars(model).get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    return own if isinstance(own, str) and own else None


def push(
    model: Any,
    repo_id: str,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **fields: Any,
) -> Any:
    """Save a model's adapters into a folder and upload it. Raises ``MissingPackageError`` without ``huggingface_hub``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **fields)  # before anything is made on the Hub
        return upload(repo_id, folder, commit_message, private, token, revision=revision, create_pr=create_pr)
