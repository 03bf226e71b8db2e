"""A training written out, for the laws that need what no run offers: a rate and an eps for each factor, and factors drawn otherwise.

    losses = train_by_hand(ground, Recipe(rate_B=2e-3), r=8)

A copy of the ground's model is adapted and trained on its lesson by torch's own optimizers. Next file: ``lab/claims``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.batches import collate, micro_batches
from minilora.lab.ground.ground import ALPHA, BATCH, Ground
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.training.losses import token_losses

__all__ = ["Recipe", "adapted", "batches", "largest_gap", "mean_loss", "train_by_hand", "weight_gradients"]


@dataclass(frozen=True)
class Recipe:
    """How to train the factors.

    Attributes:
        size_A: A is drawn so many times as large. alpha: of the scaling ``alpha / r``. rate_A, rate_B, eps_A, eps_B: of each factor.
        weight_decay: AdamW's. clip: largest norm of the whole gradient; 0 is none. sgd: plain gradient descent, without eps and momentum.
    """

    size_A: float = 1.0
    alpha: float = ALPHA
    rate_A: float = 1e-3
    rate_B: float = 1e-3
    eps_A: float = 1e-8
    eps_B: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    sgd: bool = False


def adapted(ground: Ground, seed: int, variant: str | None = None, **fields: Any) -> Any:
    """A copy of the ground's model with a fresh adapter, the seed's; on every linear layer, if ``fields`` say nothing else."""
    model = copy.deepcopy(ground.model)
    given: dict[str, Any] = {"lora_alpha": ALPHA, "target_modules": "all-linear"} | fields
    config = LoraConfig(**given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject(model, config, variant=variant)


def batches(ground: Ground, seed: int, count: int) -> list[dict[str, Tensor]]:
    """The first batches of the lesson in the order that the seed gives."""
    drawn = micro_batches(ground.lesson, BATCH, seed)
    return [collate(next(drawn), 0) for _ in range(count)]


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean cross-entropy of a batch, in nats a byte."""
    return token_losses(model, batch).mean()


def largest_gap(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of two trainings' losses; NaN, which is below no bound, if one diverged."""
    gaps = [abs(one - other) for one, other in zip(losses, others, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.nan


def _factors(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Every ``lora_A`` or every ``lora_B`` of a model."""
    return [value for path, value in model.named_parameters() if name in path.split(".")]


def weight_gradients(ground: Ground, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of every weight of the ground's model itself, by the path of its layer."""
    model = copy.deepcopy(ground.model).requires_grad_(True)
    mean_loss(model, batch).backward()
    return {name.removesuffix(".weight"): value.grad for name, value in model.named_parameters()}


def train_by_hand(ground: Ground, recipe: Recipe, r: int, steps: int, seed: int = 0) -> list[float]:
    """The loss of every step, in nats a byte."""
    model = adapted(ground, seed, r=r, lora_alpha=recipe.alpha)
    A, B = _factors(model, "lora_A"), _factors(model, "lora_B")
    with torch.no_grad():
        for factor in A:
            factor.mul_(recipe.size_A)
    optimizer, losses = _optimizer(recipe, A, B), []
    for batch in batches(ground, seed, steps):
        loss = mean_loss(model, batch)
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_([*A, *B], recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _optimizer(recipe: Recipe, A: Sequence[Tensor], B: Sequence[Tensor]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": A, "lr": recipe.rate_A}, {"params": B, "lr": recipe.rate_B}]
    if recipe.sgd:
        return torch.optim.SGD(groups, weight_decay=recipe.weight_decay)
    for group, eps in zip(groups, (recipe.eps_A, recipe.eps_B), strict=True):
        group["eps"] = eps
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
