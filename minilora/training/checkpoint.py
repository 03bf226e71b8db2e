"""A checkpoint of a run: an adapter folder with two files more, written in one step and read only where all of it is whole.

They are the optimizer's tensors, and ``training.json`` with the step, what the run depends on (``resume.meaning``), and the SHA-256 of
every file. Next file: ``training/resume.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.files.parse import parse_json, parse_tensors, tensor_bytes
from minilora.files.read import read_files
from minilora.files.write import remove, write_files
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.store.save import adapter_files
from minilora.training.guards import refuse_nonfinite

__all__ = ["Checkpoint", "prune", "read_checkpoint", "save_checkpoint", "steps"]

STATE_FILE = "training.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_FOLDER = re.compile(r"checkpoint-(\d{1,18})")
_PURPOSES = {
    STATE_FILE: "the state of the run",
    OPTIMIZER_FILE: "the optimizer's state",
    WEIGHTS_FILE: "the adapter's weights",
    CONFIG_FILE: "the adapter's config",
    SEAL_FILE: "the adapter's seal",
}


@dataclass(frozen=True)
class Checkpoint:
    """One that was read and verified: ``step`` steps are done; ``meaning`` as ``resume.meaning``."""

    path: Path
    step: int
    meaning: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(
    model: nn.Module,
    name: str,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    step: int,
    meaning: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``checkpoint-<step>`` in one step, and then remove all but the ``keep`` newest.

    Raises:
        StateError: a tensor is not finite; nothing is written. WriteError: the system does not let us.
    """
    tensors = {
        f"{key}/{path}": optimizer.state[parameter][key].cpu().contiguous()
        for path, parameter in named.items()
        for key in sorted(optimizer.state.get(parameter, {}))
    }
    refuse_nonfinite(tensors.items(), "a checkpoint")
    files = {**adapter_files(model, name), OPTIMIZER_FILE: tensor_bytes(tensors, {})}
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in sorted(files.items())}
    state = _state_bytes({"version": 1, "step": step, "meaning": meaning, "files": hashes})
    place = folder / f"checkpoint-{step}"
    write_files(place, {**files, STATE_FILE: state})
    prune(folder, keep)
    return place


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what a kill left of this."""
    remove(folder, [f"checkpoint-{old}" for old in steps(folder)[keep:]])


def _state_bytes(content: Mapping[str, Any]) -> bytes:
    """The one form of a state, its own hash in it: any other bytes are damage."""
    body = {key: content[key] for key in ("version", "step", "meaning", "files")}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def read_checkpoint(place: Path, step: int) -> Checkpoint:
    """The checkpoint in a folder, every file of it verified. Raises ``CheckpointError`` for one that is damaged or missing, by name."""
    files = read_files(place, _PURPOSES)
    try:
        state = parse_json(files[STATE_FILE])
        good = _state_bytes(state) == files[STATE_FILE] and state["version"] == 1 and state["step"] == step
        hashes = dict(state["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        good, hashes = False, {}
    if not good:
        raise CheckpointError(f"{place / STATE_FILE}: damaged, or of a newer minilora; copy the folder again")
    for name, content in files.items():
        if name != STATE_FILE and hashes.get(name) != hashlib.sha256(content).hexdigest():
            raise CheckpointError(
                f"{place / name}: damaged: its sha256 is not the one in {STATE_FILE}; copy the folder again"
            )
    weights, _ = parse_tensors(files[WEIGHTS_FILE], place / WEIGHTS_FILE)
    optimizer, _ = parse_tensors(files[OPTIMIZER_FILE], place / OPTIMIZER_FILE)
    return Checkpoint(place, step, state["meaning"], weights, optimizer)


def steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, newest first."""
    found = [match for path in folder.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]) for match in found), reverse=True)
