"""What follows from a ``TrainConfig`` for each step: the learning rate, and the seed of dropout. Nothing here needs torch.

Next file: ``training/guards.py``.
"""

from __future__ import annotations

import math

from minilora.training.settings import TrainConfig

__all__ = ["learning_rate", "step_seed"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): linear up to ``lr`` over the warm-up, then as ``config.schedule`` says.

    "cosine": half a cosine, down to ``min_lr_ratio * lr``. "linear": a line down to it. "constant": ``lr``. "wsd" (warm-up, stable, decay):
    ``lr``, and over the last ``decay`` steps down to it by ``1 - sqrt(x)`` (Hu et al. 2024, arXiv 2404.06395, section 4; the form of the
    decay from Hägele et al. 2024, arXiv 2405.18392, section 3). The lowest rate would come in the step after the last.
    """
    rise = config.steps_of("warmup")
    if step < rise:
        return config.lr * (step + 1) / rise
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * _left(config, step, rise))


def _left(config: TrainConfig, step: int, rise: int) -> float:
    """What is left of the fall, from 1 to 0, after the warm-up of ``rise`` steps."""
    gone, length = step - rise, max(1, config.steps - rise)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * gone / length))
    if config.schedule == "linear":
        return 1 - gone / length
    if config.schedule == "wsd":
        fall = config.steps_of("decay")
        return 1 - math.sqrt(max(0.0, (step - (config.steps - fall)) / fall))
    return 1.0


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator in a step: dropout is a function of (seed, step), so no random state need be saved."""
    return (seed * 1_000_003 + 7 * step + 3) % 2**63
