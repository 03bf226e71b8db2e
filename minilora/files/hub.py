"""Files of the Hugging Face Hub: fetched into its cache, found there, or uploaded; all by ``huggingface_hub``, where that is installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, ConfigError, MissingPackageError, WriteError, printable

__all__ = ["FETCH", "cached", "check_upload", "fetched", "told_upload", "upload"]

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


def check_upload(repo_id: str, token: str | bool | None = None) -> str:
    """Whoever is signed in, if they may write to a repository of this id; asks the Hub.

    Raises:
        ConfigError: no such id can be, nobody is signed in, the Hub cannot be reached, or the token may not write there; in one line.
        MissingPackageError: no ``huggingface_hub``.
    """
    api = _api(repo_id, token)
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ConfigError(f"{repo_id!r}: {_reason(error)}; wanted NAME or OWNER/NAME") from None
    try:
        found = api.whoami()
    except Exception as error:  # whatever the network says, in one line
        raise ConfigError(
            f"{repo_id}: the Hub does not say who you are ({_reason(error)}); run hf auth login, set HF_TOKEN, or leave the upload out"
        ) from None
    user, owner = str(found.get("name")), repo_id.partition("/")[0] if "/" in repo_id else None
    if owner not in (None, user, *(group.get("name") for group in found.get("orgs") or ())):
        raise ConfigError(f"{repo_id}: you are {user} on the Hub, and not of {owner}; name a repository of your own")
    if ((found.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise ConfigError(f"{repo_id}: the token of {user} may only read; make one that writes, and run hf auth login")
    return user


def upload(
    repo_id: str,
    folder: str | os.PathLike[str],
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Any:
    """Upload all files of a folder as one commit; the repository is made if it is not there. Returns what ``huggingface_hub`` says of it.

    Raises:
        MissingPackageError: no ``huggingface_hub``. Whatever the network says.
    """
    api = _api(repo_id, token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo, folder_path=os.fspath(folder), commit_message=message, **options)


def told_upload(repo_id: str, folder: str | os.PathLike[str], message: str, private: bool | None, again: str) -> str:
    """As ``upload``; returns the address. Raises ``WriteError`` in one line, with ``again``: how to try once more."""
    try:
        return str(upload(repo_id, folder, message, private).commit_url).partition("/commit/")[0]
    except MissingPackageError:
        raise
    except Exception as error:
        raise WriteError(f"{repo_id}: could not be uploaded ({_reason(error)}); {again}") from None


def _api(repo_id: str, token: str | bool | None) -> Any:
    if find_spec("huggingface_hub") is None:
        raise MissingPackageError(f"{repo_id}: an upload needs huggingface_hub; pip install it")
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _reason(error: Exception) -> str:
    return printable(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)[:200]
