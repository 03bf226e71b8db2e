"""What must be the same for the rest of a run to be the same bits: what it depends on, and what a checkpoint says of it.

Next file: ``training/resume.py``.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from minilora.data.encoding import Encoded
from minilora.data.examples import digests
from minilora.errors import CheckpointError, printable
from minilora.lora.bare import Around
from minilora.store.save import base_of, saved_config
from minilora.training.checkpoint import ENDS, Checkpoint, is_longer
from minilora.training.settings import SINCE

__all__ = ["meaning", "refuse_other"]

# What a run that goes on after its end may have otherwise: the parts of the new schedule must fit into its steps.
_OF_A_SCHEDULE = {"steps", ENDS, "warmup", "decay"}
_NAMES = ("base_model_name_or_path", "auto_mapping")  # of the base, whose fingerprint says more


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
        notes: what may be why the data are others: settings by name, and ``date``, the day that the chat template printed.
        around: as in ``fingerprint``.
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


def refuse_other(checkpoint: Checkpoint, now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Raise ``CheckpointError`` if a checkpoint is of another run than this one, whose ``meaning`` is ``now``."""
    then, where = checkpoint.meaning, checkpoint.path
    then = then | {"training": SINCE | then["training"]}
    longer = _OF_A_SCHEDULE if is_longer(now["training"], checkpoint) else set()
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
    if changed := [name for name in now if name != "date" and name in then and now[name] != then[name]]:
        return f"--{changed[0].replace('_', '-')} was {_short(then[changed[0]])} and is {_short(now[changed[0]])} ({changed[0]}=...): "
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
