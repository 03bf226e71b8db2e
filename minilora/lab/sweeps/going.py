"""One trial while it goes: its weights, its optimizer, where it is, and why it ended.

``ready`` says whether there is a step to do, ``batches`` what the step is given, and ``advance`` takes what came of it. The steps are those
of ``training/loop.py``; what ends that loop with an error ends the trial here, and no other. Next file: ``lab/sweeps/sweeping.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.batches import Collate, micro_batches
from minilora.data.encoding import Encoded
from minilora.lab.sweeps.trial import Result
from minilora.training.best import Best
from minilora.training.schedule import learning_rate, step_seed
from minilora.training.step import descend, not_finite, why_not_begun

__all__ = ["Going"]


@dataclass
class Going:
    """A trial that goes.

    Attributes:
        named: the parameters that train, by name. modules: what is switched between training and evaluation. tensors: makes its batches.
        step: steps that are done or left out. good: the last one that changed the weights. stream: what dropout is drawn from.
        spare: the weights of the lowest evaluation loss, where they are asked for.
    """

    result: Result
    named: Mapping[str, nn.Parameter]
    modules: Sequence[nn.Module]
    optimizer: torch.optim.Optimizer
    examples: Sequence[Encoded]
    tensors: Collate
    step: int = 0
    good: int = 0
    stream: torch.Generator = field(default_factory=torch.Generator)
    spare: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.result.trial.train
        self.best = Best(self.config)

    @property
    def ready(self) -> bool:
        """Whether there is a step to do."""
        return not self.result.ended and self.step < self.config.steps and not self.best.over

    def batches(self) -> list[list[Encoded]]:
        """The micro-batches of the next step."""
        config, count = self.config, self.config.accumulate
        return list(islice(micro_batches(self.examples, config.batch_size, config.seed, self.step * count), count))

    def seed(self, number: int) -> None:
        """Begin the random stream of micro-batch ``number`` of the next step."""
        self.stream.manual_seed(step_seed(self.config.seed, self.step * self.config.accumulate + number))

    def train(self, mode: bool) -> None:
        """Training or evaluation, for what is the trial's own."""
        for module in self.modules:
            module.train(mode)

    def advance(self, losses: Sequence[float]) -> None:
        """Take the step whose gradients are in place; ``losses``: of its micro-batches, whose sum is the step's."""
        total = sum(losses)
        found = [p.grad for p in self.named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(found) if found else torch.zeros(())
        bad = next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
        problem = f"the loss is {losses[bad - 1]} in micro-batch {bad}" if bad else not_finite(total, norm, self.named)
        if not self.good and (problem or norm == 0):
            self._end(why_not_begun(problem))
        elif problem:
            self._skip(problem)
        else:
            rate = learning_rate(self.config, self.step)
            self.step += 1
            record = {"step": self.step, "loss": total, "lr": rate, "grad_norm": float(norm)}
            if descend(self.optimizer, list(self.named.values()), norm, self.config.clip, rate):
                self.good = self.step
                self.result.records.append(record)
            else:
                self._end(f"step {self.step}: a weight became infinite at learning rate {rate:g}")
        self.optimizer.zero_grad()

    def _skip(self, problem: str) -> None:
        self.step += 1
        self.result.records.append({"step": self.step, "skipped": problem})
        if self.step - self.good >= self.config.max_skipped:
            self._end(f"step {self.step}: {problem}; {self.step - self.good} steps in a row (max_skipped)")

    def _end(self, why: str) -> None:
        self.result.ended = why

    @property
    def due(self) -> bool:
        """Whether it is evaluated after the step that it is at, and was not yet."""
        every, last = self.config.eval_every, self.step == self.config.steps or self.best.over
        wanted = self.step == 0 or last or (every > 0 and self.step % every == 0)
        return wanted and not self.result.ended and self.step not in self.result.evaluations

    @torch.no_grad()
    def assessed(self, loss: float) -> None:
        """Take an evaluation loss."""
        known = loss if math.isfinite(loss) else None
        self.result.records.append({"step": self.step, "eval_loss": known})
        if self.step and self.best.note(self.step, known, self.good) and self.config.keep_best:
            self.spare = {name: value.detach().clone() for name, value in self.named.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """At its end: the weights are those that the trial ends with."""
        if self.spare and not self.result.ended:
            for name, value in self.named.items():
                value.copy_(self.spare[name])
        self.result.finished = True
        self.optimizer.state.clear()  # two numbers for every weight
        self.spare = {}
        self.train(False)

    def position(self) -> dict[str, Any]:
        """Where it is, as JSON; with its weights and its optimizer's state this is all of it."""
        return {"step": self.step, "good": self.good, "evaluations": [list(one) for one in self.best.seen]}

    def put(self, position: Mapping[str, Any]) -> None:
        """Go on from there; the result is as it was then."""
        self.step, self.good = position["step"], position["good"]
        self.best.take_up(position["evaluations"])
