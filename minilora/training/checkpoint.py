"""A checkpoint of a run: an adapter folder with two files more, written in one step and read only where all of it is whole.

They are the optimizer's tensors, and ``training.json`` with the step, what the run depends on (``meaning.meaning``), and the SHA-256 of
every file. The hashes find damage, and no intent: whoever changes a file can hash it anew. So what a reader computes with is looked at,
whatever its hash. Next file: ``training/meaning.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.files.parse import parse_json, parse_tensors, tensor_bytes
from minilora.files.read import read_files
from minilora.files.write import remove, write_files
from minilora.quant.finite import is_finite
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.store.fingerprint import is_fingerprint
from minilora.store.save import adapter_files
from minilora.training.guards import refuse_nonfinite
from minilora.training.optim_state import NEVER_NEGATIVE, state_tensors

__all__ = [
    "ENDS",
    "Checkpoint",
    "is_longer",
    "own_checkpoints",
    "parse_checkpoint",
    "prune",
    "read_checkpoint",
    "read_checkpoint_files",
    "save_checkpoint",
    "steps",
    "with_more_steps",
]

STATE_FILE = "training.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_MEANING = ("training", "adapter", "data", "bits")  # and "base", and "notes" of late: what ``meaning.meaning`` writes
ENDS = "ends of earlier schedules"  # in the training part of a meaning: a run that went on after its last step has some
_FOLDER = re.compile(r"checkpoint-([1-9][0-9]{0,17})")
_PURPOSES = {
    STATE_FILE: "the state of the run",
    OPTIMIZER_FILE: "the optimizer's state",
    WEIGHTS_FILE: "the adapter's weights",
    CONFIG_FILE: "the adapter's config",
    SEAL_FILE: "the adapter's seal",
}


@dataclass(frozen=True)
class Checkpoint:
    """One that was read and verified: ``step`` steps are done; ``meaning`` as ``meaning.meaning``; ``owner``: the process that has it.

    ``evaluations``: those up to here, as ``best.Evaluation``, of a run that asks for them.
    """

    path: Path
    step: int
    meaning: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    owner: int = 0
    evaluations: Sequence[Sequence[Any]] = ()


def save_checkpoint(
    model: nn.Module,
    name: str,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    step: int,
    meaning: Mapping[str, Any],
    keep: int,
    base: Mapping[str, Any] | None = None,
    evaluations: Sequence[Any] | None = None,
    spare: int = 0,
) -> Path:
    """Write ``checkpoint-<step>`` in one step, and then remove all but the ``keep`` newest and that of step ``spare``.

    ``base`` is as for ``adapter_files``; ``evaluations`` as in ``Checkpoint``, None for a run that does not ask for them.

    Raises:
        StateError: a tensor is not finite; nothing is written. WriteError: the system does not let us.
    """
    tensors = state_tensors(optimizer, named)
    refuse_nonfinite(tensors.items(), "a checkpoint")
    files = {**adapter_files(model, name, base=base), OPTIMIZER_FILE: tensor_bytes(tensors, {})}
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in sorted(files.items())}
    content = {"version": 1, "step": step, "meaning": meaning, "files": hashes}
    state = _state_bytes(content | ({} if evaluations is None else {"evaluations": evaluations}))
    place = folder / f"checkpoint-{step}"
    write_files(place, {**files, STATE_FILE: state})
    prune(folder, keep, spare)
    return place


def prune(folder: Path, keep: int, spare: int = 0) -> None:
    """Remove all but the newest checkpoints and that of step ``spare``, and what a kill left of this."""
    remove(folder, [name for name in own_checkpoints(folder)[keep:] if name != f"checkpoint-{spare}"])


def _state_bytes(content: Mapping[str, Any]) -> bytes:
    """The one form of a state, its own hash in it: any other bytes are damage."""
    body = {key: content[key] for key in ("version", "step", "meaning", "files")}
    body |= {key: content[key] for key in ("evaluations",) if key in content}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def read_checkpoint(place: Path, step: int) -> Checkpoint:
    """The checkpoint in a folder, every file of it verified. Raises ``CheckpointError`` for one that is damaged or missing, by name."""
    return parse_checkpoint(read_checkpoint_files(place), place, step)


def read_checkpoint_files(place: Path) -> dict[str, bytearray]:
    """The files of a checkpoint as they are."""
    return read_files(place, _PURPOSES)


def parse_checkpoint(files: Mapping[str, bytearray], place: Path, step: int) -> Checkpoint:
    """The same from bytes that were read, here or by another process; ``place`` is where."""
    try:
        state = parse_json(files[STATE_FILE])
        good = (
            _state_bytes(state) == files[STATE_FILE] and _is_int(state["version"], 1) and _is_int(state["step"], step)
        )
        good = good and _is_meaning(state["meaning"], step) and _are_evaluations(state.get("evaluations", []), step)
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
    for file, tensors in ((WEIGHTS_FILE, weights), (OPTIMIZER_FILE, optimizer)):
        if bad := next((key for key, tensor in tensors.items() if not _is_likely(key, tensor, step)), None):
            raise CheckpointError(
                f"{place / file}: {bad[:200]} holds what no run leaves (NaN, infinity, a negative second moment, a step that was not "
                "done); copy the folder again"
            )
    return Checkpoint(place, step, state["meaning"], weights, optimizer, evaluations=state.get("evaluations", ()))


def _is_int(value: Any, wanted: int) -> bool:
    return type(value) is int and value == wanted  # in Python True and 1.0 are 1, too


def _is_meaning(value: Any, step: int) -> bool:
    """Whether a JSON value has the form of ``meaning.meaning``."""
    notes = value.get("notes", {}) if isinstance(value, dict) else None
    return (
        isinstance(notes, dict)
        and all(isinstance(note, str) for note in notes.values())
        and all(isinstance(value[part], dict) for part in _MEANING)
        and _are_ends(value["training"].get(ENDS, []), step)
        and is_fingerprint(value["base"])
    )


def _are_evaluations(value: Any, step: int) -> bool:
    """Whether a JSON value is a list of ``best.Evaluation`` in order, none after ``step``."""
    last = 0
    for number, loss, good in value:
        if not (type(number) is int and type(good) is int and last < number <= step and 0 < good <= number):
            return False
        if not (loss is None or (type(loss) is float and math.isfinite(loss))):
            return False
        last = number
    return isinstance(value, list)


def _are_ends(value: Any, step: int) -> bool:
    """Whether these are steps, each after the one before, that a run of ``step`` steps can have ended at."""
    whole = isinstance(value, list) and all(type(end) is int and 0 < end <= step for end in value)
    return whole and value == sorted(set(value))


def _is_likely(key: str, tensor: Tensor, step: int) -> bool:
    """Whether a tensor holds what a run of ``step`` steps can have left in it."""
    if not is_finite(tensor):
        return False
    kind = key.partition("/")[0]
    if kind in NEVER_NEGATIVE:
        return not tensor.numel() or bool(tensor.min() >= 0)
    if kind == "step":
        return tensor.numel() == 1 and 1 <= tensor.item() <= step and float(tensor.item()).is_integer()
    return True


def steps(folder: Path) -> list[int]:
    """The steps of which there are folders named as checkpoints, newest first."""
    found = [
        _FOLDER.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir() and not path.is_symlink()
    ]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def own_checkpoints(folder: Path) -> list[str]:
    """The names of those that minilora made, newest first: transformers' Trainer names its own alike, and they are not ours to remove."""
    named = [f"checkpoint-{step}" for step in steps(folder)]
    return [name for name in named if (folder / name / STATE_FILE).is_file()]


def with_more_steps(now: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """This run's ``meaning`` with the steps at which earlier schedules ended, ``ends``, as the checkpoint tells them.

    A run that was finished and goes on with more steps begins a new schedule at its last step, which is one end more.
    """
    training, then = now["training"], checkpoint.meaning["training"]
    ends = [*then.get(ENDS, []), *([checkpoint.step] if is_longer(training, checkpoint) else [])]
    return {**now, "training": {**training, ENDS: ends} if ends else dict(training)}


def is_longer(training: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is the end of its run, and this one goes further."""
    then = checkpoint.meaning["training"].get("steps")
    return type(then) is int and checkpoint.step == then and training.get("steps", 0) > then
