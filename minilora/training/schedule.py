"""What follows from a ``TrainConfig`` for each step: the learning rate, and the seed of dropout. Nothing here needs torch.

Next file: ``training/guards.py``.
"""

from __future__ import annotations

import math

from minilora.training.settings import TrainConfig

__all__ = ["learning_rate", "step_seed"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): linear up to ``lr`` over the warm-up, then half a cosine down to zero."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator in a step: dropout is a function of (seed, step), so no random state need be saved."""
    return (seed * 1_000_003 + 7 * step + 3) % 2**63
