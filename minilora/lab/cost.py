"""What a step of a trial costs by itself: seconds, and the most memory that it holds.

A sweep shares the time of a pass out by tokens, so it cannot say what one variant takes; here each is built alone and stepped. The variants
take turns, round after round, so that a computer that is busy for a while slows them all. Next file: ``lab/variants.py``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, MiniLoraError
from minilora.job.start import begin_new
from minilora.lab.sweeps.trial import Trial
from minilora.measure.plan import predict, training_step
from minilora.training.losses import token_losses
from minilora.training.optim_choice import optimizer_of

__all__ = ["Cost", "costs"]

STEPS = 3  # timed in a round, after one that warms up
START_EXAMPLES = 64  # as a sweep's


@dataclass(frozen=True)
class Cost:
    """Of one trial.

    Attributes:
        seconds: of a step, the median of each round. memory: bytes held at the peak of a step with AdamW, the model's weights included,
            counted from the storages that the operations make (``measure/plan.py``), so it is exact and has no spread.
        parameters: that train.
    """

    seconds: Sequence[float]
    memory: int
    parameters: int


def costs(
    model: nn.Module, examples: Sequence[Encoded], trials: Mapping[str, Trial], rounds: int = 3, pad_id: int = 0
) -> dict[str, Cost]:
    """Build every trial on a copy of the model, and step it on the first batch of examples.

    Raises:
        ConfigError: a trial that this model cannot have, by name, before any is timed. StateError: as ``measure.plan.predict``.
    """
    counted = {name: _counted(model, examples, trial, name, pad_id) for name, trial in trials.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(rounds):
        for name, trial in trials.items():
            seconds[name].append(_seconds(model, examples, trial, pad_id))
    return {name: Cost(seconds[name], *counted[name]) for name in trials}


def _counted(model: nn.Module, examples: Sequence[Encoded], trial: Trial, name: str, pad_id: int) -> tuple[int, int]:
    """Bytes at the peak, and parameters that train."""
    try:
        own, named = _built(model, examples, trial, pad_id)
        optimizer_of(own, named, trial.train)
    except MiniLoraError as error:
        raise ConfigError(f"variant {name!r} cannot be trained here: {error}") from error
    loss_of = _Loss(examples, trial, pad_id)
    return predict(own, loss_of).peak, sum(parameter.numel() for parameter in named.values())


def _seconds(model: nn.Module, examples: Sequence[Encoded], trial: Trial, pad_id: int) -> float:
    own, named = _built(model, examples, trial, pad_id)
    optimizer, loss_of, spent = optimizer_of(own, named, trial.train), _Loss(examples, trial, pad_id), []
    for _ in range(1 + STEPS):
        begun = time.perf_counter()
        training_step(own, optimizer, loss_of).item()  # which waits for the device
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent[1:])


def _built(
    model: nn.Module, examples: Sequence[Encoded], trial: Trial, pad_id: int
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the model that is ready to train, and what trains in it."""
    own = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        if trial.lora is None:
            own.requires_grad_(True)
        else:
            begin_new(own, trial.lora, trial.train, trial.variant, examples, pad_id, START_EXAMPLES)
    return own.train(), {name: value for name, value in own.named_parameters() if value.requires_grad}


class _Loss:
    """The loss of the first batch of a trial, given a model."""

    def __init__(self, examples: Sequence[Encoded], trial: Trial, pad_id: int) -> None:
        self.batch = collate(examples[: trial.train.batch_size], pad_id)

    def __call__(self, model: Any) -> Tensor:
        place = next(model.parameters()).device
        return token_losses(model, {name: value.to(place) for name, value in self.batch.items()}).mean()
