"""A run on the Hugging Face Hub: its adapter, its seal, its log, and a card that says how it came about. Next file: ``job/card.py``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from minilora.errors import CheckpointError
from minilora.files.hub import check_upload, told_upload
from minilora.files.read import read_files
from minilora.files.write import write_files
from minilora.job.card import card_files
from minilora.proof.probe import PROBE_FILE
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.training.left import LOG_FILE

__all__ = ["check_upload", "push_run"]

_FILES = {CONFIG_FILE: "the adapter's config", WEIGHTS_FILE: "the adapter's weights"}
_MAYBE = {SEAL_FILE: "the adapter's seal", LOG_FILE: "the log of the run", PROBE_FILE: "its probe"}


def push_run(folder: str | os.PathLike[str], repo_id: str, private: bool | None = None) -> str:
    """Upload a run, or any adapter folder, as one commit; returns its address. ``job.json`` stays: it names files of this machine.

    Args:
        repo_id: OWNER/NAME or NAME; made if it is not there. private: whether one that is made is; None as the owner's usual.

    Raises:
        CheckpointError: the folder holds no whole adapter. WriteError: the Hub does not take it; in one line with the way out.
        ConfigError: as ``check_upload``.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; wanted a run, or the folder of an adapter")
    files = {name: bytes(raw) for name, raw in read_files(place, _FILES | _MAYBE, _MAYBE).items()}
    with tempfile.TemporaryDirectory() as staged:
        write_files(Path(staged) / "run", files | card_files(place, repo_id))
        again = f"{place} is whole; try again with minilora push {place} {repo_id}"
        return told_upload(repo_id, Path(staged) / "run", "Upload adapter", private, again)
