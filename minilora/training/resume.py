"""Going on with a run: what lies in its folder, which checkpoint is taken, and what must be the same for the rest to be the same bits.

There is no random state in a checkpoint (``training/checkpoint.py``): the order of the data and every step's dropout are functions of
(seed, step). Next file: ``training/step.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.data.encoding import Encoded
from minilora.data.examples import digests
from minilora.errors import CheckpointError, ConfigError, printable
from minilora.files.parse import parse_json
from minilora.files.read import refuse_path
from minilora.files.write import remove
from minilora.lora.bare import Around
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.store.save import adapter_state_dict, base_of, saved_config
from minilora.training.checkpoint import (
    ENDS,
    Checkpoint,
    is_longer,
    own_checkpoints,
    parse_checkpoint,
    read_checkpoint_files,
    steps,
)
from minilora.training.lock import refuse_held
from minilora.training.optim_state import form_of, put_state, state_form
from minilora.training.processes import ALONE, Processes
from minilora.training.profile import TRACE_FILE

__all__ = ["LOG_FILE", "RECORD_FILE", "claim", "clear", "kept_records", "meaning", "newest", "refuse_left", "restore"]

LOG_FILE = "log.jsonl"
RECORD_FILE = "job.json"  # what a job remembers (``job/record.py``)
# What a run leaves beside its checkpoints.
_LEFT = (LOG_FILE, RECORD_FILE, TRACE_FILE, "report.html", WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE)
_LONGEST_LINE = 16_000_000  # bytes of the log; an answer is far shorter
_LARGEST = 1e300
_NAMES = ("base_model_name_or_path", "auto_mapping")  # of the base, whose fingerprint says more


# ---- the run folder


def claim(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ``CheckpointError`` if a run goes on in the folder, or lies there and nobody said what to do with it; nothing is changed."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted one: go on with the run, or begin anew")
    refuse_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={str(folder)!r} is a file; wanted a folder for the run")
    refuse_held(folder)
    if not (resume or overwrite):
        refuse_left(folder)


def refuse_left(folder: Path) -> None:
    """Raise ``CheckpointError`` if a run lies in the folder."""
    if left := _left(folder):
        raise CheckpointError(
            f"{folder}: holds a run already ({left[0]}); go on with it by --resume (resume=True), replace it by --overwrite "
            "(overwrite=True), or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove what a run left in the folder; files of others stay."""
    remove(folder, own_checkpoints(folder) + _files_left(folder))


def _left(folder: Path) -> list[str]:
    return [f"checkpoint-{step}" for step in steps(folder)] + _files_left(folder)


def _files_left(folder: Path) -> list[str]:
    return [name for name in _LEFT if os.path.lexists(folder / name)]


def kept_records(folder: Path, step: int, processes: Processes = ALONE, owner: int = 0) -> list[dict[str, Any]]:
    """The lines of the log up to a step; what came after it will come again, and a line that a power cut tore is left out.

    Of several processes the one that has the checkpoint, ``owner``, tells its lines to all.
    """
    return processes.share(_records(folder, step) if processes.rank == owner else None)[owner]


def _records(folder: Path, step: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    if not (folder / LOG_FILE).is_file():
        return records
    with (folder / LOG_FILE).open("rb") as log:
        while line := log.readline(_LONGEST_LINE):  # what is longer is read in pieces, and no piece is a record
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if _is_record(record) and record["step"] <= step:
                records.append(record)
    return records


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line is one that the loop writes, with numbers where the report draws numbers: the file may have been edited."""
    texts = {"prompt", "answer", "skipped"}
    plain = all(
        isinstance(value, str) if key in texts else key == "eval_loss" if value is None else _is_number(value)
        for key, value in record.items()
    )
    whole = plain and type(record.get("step")) is int and record["step"] >= 0
    return whole and isinstance(record.get("seconds", 0.0), float) and record.get("seconds", 0.0) >= 0


def _is_number(value: Any) -> bool:
    return (
        type(value) in (int, float) and -_LARGEST < value < _LARGEST
    )  # not NaN, and no whole number beyond all floats


# ---- what must be the same


def meaning(
    model: nn.Module,
    name: str,
    training: Mapping[str, Any],
    data: Mapping[str, Sequence[Encoded]],
    bits: Mapping[str, Any],
    notes: Mapping[str, str],
    around: Around = nullcontext,
) -> dict[str, Any]:
    """What a run depends on, as JSON: change any of it, and it is another run.

    Args:
        name: of the adapter. training: settings that change a step. data: sets of examples by what they are for.
        bits: settings that change the order of its sums alone: another value is told, and allowed.
        notes: what may be why the data are others: ``date``, the day that the chat template printed. around: as in ``fingerprint``.
    """
    here = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    here["device"] = next(model.parameters()).device.type
    found = {
        "training": dict(training),
        "adapter": {key: value for key, value in saved_config(model, name).items() if key not in _NAMES},
        "data": {what: _hash(examples) for what, examples in data.items()},
        "base": base_of(model, name, around=around),
        "bits": {**bits, **here},
        "notes": dict(notes),
    }
    return json.loads(json.dumps(found))


def _hash(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for each in digests(examples):
        digest.update(each)
    return digest.hexdigest()


def _refuse_other(checkpoint: Checkpoint, now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    then, where = checkpoint.meaning, checkpoint.path
    longer = {"steps", ENDS} if is_longer(now["training"], checkpoint) else set()
    for part, words in (("training", "schedule"), ("adapter", "adapter"), ("data", "data set")):
        keys = sorted((now[part].keys() | then[part].keys()) - longer)
        if changed := [key for key in keys if _text(now[part].get(key)) != _text(then[part].get(key))]:
            here, there = (_short(side[part].get(changed[0])) for side in (now, then))
            cause = _cause(now["notes"], then.get("notes", {})) if part == "data" else ""
            raise CheckpointError(
                f"{where}: another {words}: {_short(changed[0])} is {here}, in the checkpoint {there}; {cause}set it back, or "
                "begin anew with --overwrite"
            )
    if checkpoint.step > now["training"].get("steps", checkpoint.step):
        raise CheckpointError(
            f"{where}: its step {checkpoint.step} is after the last of the run, {now['training']['steps']}; copy the folder again, or "
            "begin anew with --overwrite"
        )
    if _text({key: now["base"].get(key) for key in then["base"]}) != _text(
        then["base"]
    ):  # an older minilora remembered less
        raise CheckpointError(
            f"{where}: another base model: its weights, dtype or packing are not those of the checkpoint; load the same one, or begin "
            "anew with --overwrite"
        )
    for key, value in now["bits"].items():
        if value != then["bits"].get(key):
            say(
                f"{key} is {value}, in the checkpoint {_short(then['bits'].get(key))}: the same run, but its last bits may differ"
            )


def _text(value: Any) -> str:
    """What two values must have in common to be the same: 1 is not true, nor 1.0."""
    return json.dumps(value, sort_keys=True)


def _cause(now: Mapping[str, str], then: Mapping[str, str]) -> str:
    """Why the data may be others, and the way out."""
    if now.get("date") == then.get("date"):
        return ""
    was = _short(then.get("date", ""))
    return (
        f"the chat template prints the date, which is {now.get('date', 'another one')} now and was {was or 'another one'}: give --date "
        f"{was or 'and the day on which the run began'} (date=...), or "
    )


def _short(value: Any) -> str:
    """A value of a checkpoint as a message may hold it: it may be of any length, and hold any sign."""
    text = printable(str(value))
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- choosing and restoring


def newest(folder: Path, say: Callable[[str], None], processes: Processes = ALONE) -> Checkpoint | None:
    """The newest checkpoint that verifies; ``say`` gets a line for each that does not. None if the folder has none at all.

    Each of several processes looks into its own folder, and the one that has the newest gives it to all.

    Raises:
        CheckpointError: there are some, and all are damaged; or there is none, and a finished adapter.
    """
    step, files, passed, problem = _newest_here(folder)
    every = processes.share([step, passed, problem])
    for line in dict.fromkeys(line for _, lines, _ in every for line in lines):
        say(line)
    best = max(step for step, _, _ in every)
    owner = next(rank for rank, (step, _, _) in enumerate(every) if step == best)
    if best:
        place = folder / f"checkpoint-{best}"
        return replace(parse_checkpoint(processes.send(files, owner), place, best), owner=owner)
    if problem := next((problem for _, _, problem in every if problem), None):
        raise CheckpointError(problem)
    return None


def _newest_here(folder: Path) -> tuple[int, dict[str, bytearray], list[str], str | None]:
    """``(step, files)`` of the newest whole checkpoint in this folder, 0 for none; in words those passed over, and what is wrong."""
    found, anew = steps(folder), "begin anew with --overwrite (overwrite=True)"
    passed: list[str] = []
    for step in found:
        try:
            files = read_checkpoint_files(folder / f"checkpoint-{step}")
            parse_checkpoint(files, folder / f"checkpoint-{step}", step)
            return step, files, passed, None
        except CheckpointError as error:
            passed.append(f"skipped {error}")
    if found:
        return 0, {}, passed, f"{folder}: none of its {len(found)} checkpoints is whole; restore one, or {anew}"
    if (folder / WEIGHTS_FILE).exists():
        problem = f"{folder}: holds an adapter and no checkpoint of its end, so there is nothing to go on with; {anew}"
        return 0, {}, passed, problem
    return 0, {}, passed, None


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
    wanted = {
        f"{what}/{path}": form
        for path, parameter in named.items()
        for what, form in state_form(optimizer, parameter).items()
    }
    strange = sorted(own.keys() ^ checkpoint.weights.keys()) + sorted(checkpoint.optimizer.keys() - wanted.keys())
    begun = {path for key in checkpoint.optimizer for _, _, path in [key.partition("/")]}
    strange += sorted({key for key in wanted if key.partition("/")[2] in begun} - checkpoint.optimizer.keys())
    if not begun:  # some may lack theirs: no gradient has reached them yet
        strange.append("the optimizer's state")
    if not strange:
        strange = [key for key, tensor in checkpoint.weights.items() if form_of(tensor) != form_of(own[key])]
        strange += [key for key, tensor in checkpoint.optimizer.items() if form_of(tensor) != wanted[key]]
    if strange:
        raise CheckpointError(
            f"{checkpoint.path}: {strange[0][:200]} is missing here or there, or of another shape or dtype; load the "
            "model that it was trained on"
        )
    with torch.no_grad():
        for key, tensor in checkpoint.weights.items():
            own[key].copy_(tensor)
    put_state(optimizer, named, checkpoint.optimizer)
