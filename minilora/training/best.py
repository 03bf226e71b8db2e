"""The evaluations of a run: whether it stops early, and which of its weights it ends with.

Both are functions of the evaluations after the first step, in order. A checkpoint holds them, so a run that is gone on with decides alike;
and all processes do, because they all get the same loss. Next file: ``training/run_folder.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minilora.errors import CheckpointError, ConfigError
from minilora.training.checkpoint import Checkpoint, parse_checkpoint, read_checkpoint_files
from minilora.training.processes import Processes
from minilora.training.settings import TrainConfig

__all__ = ["Best", "Evaluation", "fetch", "refuse_without_evaluations"]


class Evaluation(NamedTuple):
    """One evaluation: after which step, its loss in nats a token (None where it was not finite), and the step whose weights these were."""

    step: int
    loss: float | None
    good: int


@dataclass
class Best:
    """What the evaluations of a run say. ``config`` asks for it; ``seen``: the evaluations after the first step, in order."""

    config: TrainConfig
    seen: list[Evaluation] = field(default_factory=list)

    def note(self, step: int, loss: float | None, good: int) -> bool:
        """Take in an evaluation; returns whether it is the lowest so far."""
        self.seen.append(Evaluation(step, loss, good))
        return self.lowest is self.seen[-1]

    @property
    def lowest(self) -> Evaluation | None:
        """The evaluation of the lowest loss, the first of equals; None where no loss was finite."""
        finite = [one for one in self.seen if one.loss is not None]
        return min(finite, key=lambda one: one.loss or 0.0, default=None)

    @property
    def without_gain(self) -> int:
        """How many evaluations in a row, up to the last, were not lower by more than ``min_delta`` than the best before them."""
        best, count = math.inf, 0
        for one in self.seen:
            gained = one.loss is not None and one.loss < best - self.config.min_delta
            best, count = (one.loss or 0.0, 0) if gained else (best, count + 1)
        return count

    @property
    def over(self) -> bool:
        """Whether the run stops here."""
        return 0 < self.config.patience <= self.without_gain

    @property
    def spare(self) -> int:
        """The step of the checkpoint that must stay, 0 for none."""
        return self.lowest.good if self.config.keep_best and self.lowest else 0

    def up_to(self, step: int) -> list[Evaluation] | None:
        """What a checkpoint of this step holds of it; None where nobody asks."""
        wanted = self.config.patience or self.config.keep_best
        return [one for one in self.seen if one.step <= step] if wanted else None

    def take_up(self, kept: Sequence[Sequence[Any]]) -> None:
        """Go on from what a checkpoint held."""
        self.seen = [Evaluation(*one) for one in kept]


def refuse_without_evaluations(config: TrainConfig, evaluation: Sequence[Any]) -> None:
    """Raise ``ConfigError`` where something hangs on evaluations and there is no data for them."""
    for name in ("patience", "keep_best"):
        if getattr(config, name) and not evaluation:
            raise ConfigError(
                f"{name}: there is no data to evaluate on; give some (--eval-share 0.1), or leave {name} out"
            )


def fetch(folder: Path, step: int, processes: Processes) -> Checkpoint:
    """The checkpoint of this step, from whichever process has it, given to all. Raises ``CheckpointError`` where none has it whole."""
    place, files, problem = folder / f"checkpoint-{step}", {}, ""
    try:
        files = read_checkpoint_files(place)
        parse_checkpoint(files, place, step)
    except CheckpointError as error:
        problem = str(error)
    every = processes.share(problem)
    owner = next((rank for rank, said in enumerate(every) if not said), None)
    if owner is None:
        raise CheckpointError(
            f"{every[0]}; it holds the lowest evaluation loss (keep_best): restore it, or begin anew with --overwrite"
        )
    return parse_checkpoint(processes.send(files, owner), place, step)
