"""What a run leaves so that it can be gone on with: checkpoints, and what must be the same for the rest of it to be the same bits.

A checkpoint is an adapter folder with two files more: the optimizer's tensors, and ``training.json`` with the step, the fingerprints of
data, base and settings, and the SHA-256 of every file. There is no random state in it: the order of the data and every step's dropout
are functions of (seed, step). Next file: ``training/loop.py``.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError
from minilora.files.parse import parse_json, parse_tensors, tensor_bytes
from minilora.files.read import read_files
from minilora.files.write import remove, write_files
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.store.save import adapter_files, adapter_state_dict, base_of, saved_config
from minilora.training.data import Encoded
from minilora.training.guards import refuse_nonfinite

__all__ = [
    "LOG_FILE",
    "Checkpoint",
    "claim",
    "clear",
    "kept_records",
    "meaning",
    "newest",
    "restore",
    "save_checkpoint",
]

LOG_FILE = "log.jsonl"
STATE_FILE = "training.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_LEFT = (LOG_FILE, "report.html", WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE)  # what a run leaves beside its checkpoints
_FOLDER = re.compile(r"checkpoint-(\d{1,18})")
_PURPOSES = {
    STATE_FILE: "the state of the run",
    OPTIMIZER_FILE: "the optimizer's state",
    WEIGHTS_FILE: "the adapter's weights",
    CONFIG_FILE: "the adapter's config",
    SEAL_FILE: "the adapter's seal",
}
_NAMES = ("base_model_name_or_path", "auto_mapping")  # of the base, whose fingerprint says more
_KEYS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter


@dataclass(frozen=True)
class Checkpoint:
    """One that was read and verified: ``step`` steps are done; ``meaning`` as below."""

    path: Path
    step: int
    meaning: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


# ---- the run folder


def claim(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ``CheckpointError`` if a run lies in the folder and nobody said what to do with it; nothing is changed."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted one: go on with the run, or begin anew")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={str(folder)!r} is a file; wanted a folder for the run")
    left = _left(folder)
    if left and not (resume or overwrite):
        raise CheckpointError(
            f"{folder}: holds a run already ({left[0]}); go on with it by --resume (resume=True), replace it by --overwrite "
            "(overwrite=True), or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove what a run left in the folder; files of others stay."""
    remove(folder, _left(folder))


def _left(folder: Path) -> list[str]:
    names = [name for name in _LEFT if (folder / name).exists()]
    return [f"checkpoint-{step}" for step in _steps(folder)] + names


def _steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, newest first."""
    found = [match for path in folder.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]) for match in found), reverse=True)


def kept_records(folder: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the log up to a step; what came after it will come again, and a line that a power cut tore is left out."""
    records = []
    for line in (folder / LOG_FILE).read_bytes().splitlines() if (folder / LOG_FILE).is_file() else ():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(at := record.get("step"), int) and at <= step and isinstance(record.get("seconds", 0.0), float):
            records.append(record)
    return records


# ---- what must be the same


def meaning(
    model: nn.Module,
    name: str,
    training: Mapping[str, Any],
    data: Mapping[str, Sequence[Encoded]],
    bits: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run depends on, as JSON: change any of it, and it is another run.

    Args:
        name: of the adapter. training: settings that change a step. data: sets of examples by what they are for.
        bits: settings that change the order of its sums alone: another value is told, and allowed.
    """
    here = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    here["device"] = next(model.parameters()).device.type
    found = {
        "training": dict(training),
        "adapter": {key: value for key, value in saved_config(model, name).items() if key not in _NAMES},
        "data": {what: _hash(examples) for what, examples in data.items()},
        "base": base_of(model, name),
        "bits": {**bits, **here},
    }
    return json.loads(json.dumps(found))


def _hash(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def _refuse_other(checkpoint: Checkpoint, now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    then, where = checkpoint.meaning, checkpoint.path
    for part, words in (("training", "schedule"), ("adapter", "adapter"), ("data", "data set")):
        keys = sorted(now[part].keys() | then[part].keys())
        if changed := [key for key in keys if now[part].get(key) != then[part].get(key)]:
            here, there = (_short(side[part].get(changed[0])) for side in (now, then))
            raise CheckpointError(
                f"{where}: another {words}: {changed[0]} is {here}, in the checkpoint {there}; set it back, or begin anew with --overwrite"
            )
    if now["base"] != then["base"]:
        raise CheckpointError(
            f"{where}: another base model: its weights, dtype or packing are not those of the checkpoint; load the same one, or begin "
            "anew with --overwrite"
        )
    for key, value in now["bits"].items():
        if value != then["bits"].get(key):
            say(
                f"{key} is {value}, in the checkpoint {then['bits'].get(key)}: the same run, but its last bits may differ"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- writing


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
    remove(folder, [f"checkpoint-{old}" for old in _steps(folder)[keep:]])


def _state_bytes(content: Mapping[str, Any]) -> bytes:
    """The one form of a state, its own hash in it: any other bytes are damage."""
    body = {key: content[key] for key in ("version", "step", "meaning", "files")}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


# ---- reading


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; ``say`` gets a line for each that does not. None if the folder has none at all.

    Raises:
        CheckpointError: there are some, and all are damaged; or there is none, and a finished adapter.
    """
    steps = _steps(folder)
    for step in steps:
        try:
            return _read(folder / f"checkpoint-{step}", step)
        except CheckpointError as error:
            say(f"skipped {error}")
    if steps:
        raise CheckpointError(
            f"{folder}: none of its {len(steps)} checkpoints is whole; restore one, or begin anew with --overwrite (overwrite=True)"
        )
    if (folder / WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{folder}: holds an adapter and no checkpoint, so there is nothing to go on with; begin anew with --overwrite (overwrite=True)"
        )
    return None


def _read(place: Path, step: int) -> Checkpoint:
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


def restore(
    model: nn.Module,
    name: str,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    now: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Put a checkpoint's weights and optimizer state into place. ``now`` is this run's ``meaning``.

    Raises:
        CheckpointError: it is of another run, by name; nothing has changed then.
    """
    _refuse_other(checkpoint, now, say)
    own = adapter_state_dict(model, name)
    states = {f"{key}/{path}": (key, parameter) for path, parameter in named.items() for key in _KEYS}
    strange = sorted(own.keys() ^ checkpoint.weights.keys()) + sorted(checkpoint.optimizer.keys() - states.keys())
    if not strange:
        strange = [key for key, tensor in checkpoint.weights.items() if _form(tensor) != _form(own[key])]
        for key, tensor in checkpoint.optimizer.items():
            kind, parameter = states[key]
            if _form(tensor) != (_form(parameter) if kind != "step" else _form(torch.tensor(0.0))):
                strange.append(key)
    if strange:
        raise CheckpointError(
            f"{checkpoint.path}: {strange[0]} is missing here or there, or of another shape or dtype; load the model that it was trained on"
        )
    with torch.no_grad():
        for key, tensor in checkpoint.weights.items():
            own[key].copy_(tensor)
    index = {path: number for number, path in enumerate(named)}
    held: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.optimizer.items():
        kind, _, path = key.partition("/")
        held.setdefault(index[path], {})[kind] = tensor.clone()
    optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
