"""Files of the Hugging Face Hub: fetched into its cache, or found there. It is the work of ``huggingface_hub``, where that is installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, MissingPackageError, printable

__all__ = ["FETCH", "cached", "fetched"]

FETCH = ("revision", "cache_dir", "token", "force_download", "local_files_only", "proxies", "repo_type")


def fetched(
    name: str | os.PathLike[str],
    subfolder: str,
    wanted: Collection[str],
    maybe: Collection[str],
    where: Mapping[str, Any],
) -> Path:
    """The folder with an adapter's files: a path as it is, an id ("owner/name") fetched into the cache.

    Args:
        wanted, maybe: names of files; those of ``maybe`` need not be there. where: arguments of ``FETCH``.

    Raises:
        CheckpointError: an id that cannot be fetched. MissingPackageError: no ``huggingface_hub``.
    """
    local, said = Path(name) / subfolder, os.fspath(name)
    if local.exists() or os.path.isabs(said) or said.startswith(".") or said.count("/") != 1:
        return local
    if find_spec("huggingface_hub") is None:
        raise MissingPackageError(
            f"{said}: no such folder, and huggingface_hub is not installed to look on the Hub; pip install it"
        )
    from huggingface_hub import hf_hub_download

    try:
        found = [hf_hub_download(said, file, subfolder=subfolder or None, **where) for file in wanted]
    except Exception as error:  # whatever the network says, in one line
        reason = printable(str(error)).split(". ")[0][:200]
        raise CheckpointError(
            f"{said}: no such folder, and the Hub does not give an adapter of that id ({reason})"
        ) from None
    for file in maybe:
        with contextlib.suppress(Exception):
            hf_hub_download(said, file, subfolder=subfolder or None, **where)
    return Path(found[0]).parent


def cached(name: str | None, file: str) -> Path | None:
    """A file of an id, if it was fetched once; asks no network. None for a folder on this disk too."""
    if not name or os.path.isdir(name) or name.count("/") > 1 or find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # no id
        return None
    return Path(found) if isinstance(found, str) else None
