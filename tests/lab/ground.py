"""Grounds for tests of claims: one that trains a tiny model, and one whose results are planted, so that a verdict must follow them."""

from collections.abc import Callable
from typing import Any

import torch

from minilora.data.encoding import Encoded
from minilora.lab.ground.ground import Ground
from minilora.lab.sweeps.trial import Result, Trial
from tests import models

BEFORE = 2.0  # planted loss before the first step


class TinyGround(Ground):
    """A model of two layers of width 64, the least side of any, examples of twelve tokens, and few steps."""

    def __init__(self, steps: int = 2) -> None:
        super().__init__(steps, say=lambda line: None)
        self.model: Any = models.llama(0, num_key_value_heads=4).eval().requires_grad_(False)
        self.lesson = _examples(0, 64)
        self.held_out = _examples(1, 4)
        self.prose = _examples(2, 4)


class PlantedGround(Ground):
    """Trains nothing: ``loss`` and ``forgetting`` give what comes of a trial."""

    def __init__(
        self, loss: Callable[[Trial], float], forgetting: Callable[[Trial], float] = lambda trial: 0.1
    ) -> None:
        Ground.__init__(self, say=lambda line: None)
        self.loss, self.forgetting, self.asked = loss, forgetting, list[Trial]()

    def results(self, trials: Any, model: Any = None, lesson: Any = None, key: str = "") -> list[Result]:
        self.asked += trials
        return [self._planted(trial) for trial in trials]

    def _planted(self, trial: Trial) -> Result:
        losses = [{"step": 0, "eval_loss": BEFORE}, {"step": self.steps, "eval_loss": self.loss(trial)}]
        return Result(trial, "planted", records=losses, parameters=7, measured={"forgetting": self.forgetting(trial)})


def _examples(seed: int, count: int) -> list[Encoded]:
    ids = torch.randint(2, 64, (count, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Encoded(tuple(row), tuple(row)) for row in ids]
