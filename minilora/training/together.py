"""What the processes of a run do together before its first step and at its saves: make room, and see that they are alike.

Next file: ``training/loop.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import ConfigError, TrainingError
from minilora.store.save import adapter_state_dict
from minilora.training.left import clear, refuse_left
from minilora.training.processes import Processes

__all__ = ["make_room", "order_of_sums", "refuse_apart", "refuse_different"]

_PARTS = {"schedule": "training", "adapter": "adapter", "data file": "data", "base model": "base"}  # of a meaning
_BITS = {
    "torch": "version of torch",
    "threads": "number of threads",
    "machine": "kind of machine",
    "device": "kind of device",
    "attention": "implementation of attention",
    "packed": "answer whether examples can be packed",
}


def order_of_sums(processes: Processes, accumulate: int) -> str:
    """How the gradients of a step are added, in words: what its last bits depend on.

    Raises:
        ConfigError: there are fewer micro-batches than processes.
    """
    if accumulate < processes.size:
        raise ConfigError(
            f"accumulate={accumulate}: the {processes.size} processes share the micro-batches of a step, so some would have none; "
            f"wanted accumulate={processes.size} at least (with a smaller batch_size the step stays as large)"
        )
    return "pairwise" if processes.is_exact(accumulate) else f"all-reduce over {processes.size} processes"


def refuse_different(
    processes: Processes, meaning: Mapping[str, Any], command: str, model: nn.Module, adapter: str
) -> None:
    """Raise ``ConfigError`` on all where one would train something else: nothing is written yet. ``meaning`` as ``meaning.meaning``."""
    known = {name: _hash(meaning[part]) for name, part in _PARTS.items()} | {"command": command}
    known |= {_BITS.get(name, name): value for name, value in meaning["bits"].items()}
    processes.agree(known | {"start of the adapter (its seed)": _digest(processes, model, adapter)})


def refuse_apart(processes: Processes, model: nn.Module, adapter: str, step: int, saved: int) -> None:
    """Raise ``TrainingError`` on all where the adapters have come apart, which another kind of processor in one of them can do."""
    every = processes.share(_digest(processes, model, adapter))
    if other := next((rank for rank, digest in enumerate(every) if digest != every[0]), None):
        raise TrainingError(
            f"after step {step} {processes.name(other)} has another adapter than process 0: their processors do not round alike; "
            f"{f'checkpoint-{saved}' if saved else 'nothing'} is what is saved; use machines of one kind"
        )


def make_room(processes: Processes, folder: Path, resume: bool, overwrite: bool) -> None:
    """Make room in the run folder, and then in the folders of other machines."""
    if overwrite and processes.first:
        clear(folder)
    elif processes.first and not resume:
        refuse_left(folder)  # another run may have come and gone since
    processes.share("room")
    if overwrite and processes.local == 0 and not processes.first:
        clear(folder)
    processes.share("room")


def _digest(processes: Processes, model: nn.Module, adapter: str) -> str:
    """A hash of all that the adapter keeps, or "" where there is nobody to compare it with."""
    digest = hashlib.sha256()
    if processes.size == 1:
        return ""
    for tensor in adapter_state_dict(model, adapter).values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
