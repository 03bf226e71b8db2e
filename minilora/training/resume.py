"""Going on with a run: which checkpoint is taken, and how it is put into place.

There is no random state in a checkpoint (``training/checkpoint.py``): the order of the data and every step's dropout are functions of
(seed, step). Next file: ``training/step.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import WEIGHTS_FILE
from minilora.store.projections import projections_in
from minilora.store.save import adapter_state_dict, laid_out
from minilora.training.checkpoint import Checkpoint, parse_checkpoint, read_checkpoint_files, steps
from minilora.training.meaning import refuse_other
from minilora.training.optim_state import form_of, put_state, state_form
from minilora.training.processes import ALONE, Processes

__all__ = ["newest", "put_weights", "restore"]


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
    refuse_other(checkpoint, now, say)
    own, weights = adapter_state_dict(model, name), laid_out(adapters_of(model).named(name), checkpoint.weights, False)
    wanted = {
        f"{what}/{path}": form
        for path, parameter in named.items()
        for what, form in state_form(optimizer, parameter).items()
    }
    strange = sorted(own.keys() ^ weights.keys()) + sorted(checkpoint.optimizer.keys() - wanted.keys())
    begun = {path for key in checkpoint.optimizer for _, _, path in [key.partition("/")]}
    strange += sorted({key for key in wanted if key.partition("/")[2] in begun} - checkpoint.optimizer.keys())
    if not begun:  # some may lack theirs: no gradient has reached them yet
        strange.append("the optimizer's state")
    shared = projections_in(
        adapters_of(model).named(name)
    )  # a checkpoint without them, or with others, is of another adapter
    strange += [key for key, held in shared.items() if not _is(checkpoint.weights.get(key), held)]
    if not strange:
        strange = [key for key, tensor in weights.items() if form_of(tensor) != form_of(own[key])]
        strange += [key for key, tensor in checkpoint.optimizer.items() if form_of(tensor) != wanted[key]]
    if strange:
        raise CheckpointError(
            f"{checkpoint.path}: {strange[0][:200]} is missing here or there, or of another shape or dtype; load the "
            "model that it was trained on"
        )
    put_weights(model, name, checkpoint.weights)
    put_state(optimizer, named, checkpoint.optimizer)


@torch.no_grad()
def _is(tensor: Tensor | None, held: Tensor) -> bool:
    return tensor is not None and tensor.shape == held.shape and torch.equal(tensor, held.cpu())


def put_weights(model: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the adapter that they are of."""
    own = adapter_state_dict(model, name)
    for key, tensor in laid_out(adapters_of(model).named(name), weights, False).items():
        own[key].copy_(tensor)
