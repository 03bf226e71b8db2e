"""Lesson 11. Your own variant: one solution.

An update that is linear in x is known from its values at the unit vectors. One that is not shows at zero (a bias), at large inputs (a
clamp), at small ones (a dead zone), at one sign (a relu), or when several rows come together (a mean); so all of them are tried.
"""

from collections.abc import Callable

import torch


def update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    return v * (scaling * (x @ A.T @ B.T))


def delta_weight(A: torch.Tensor, B: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    return v[:, None] * (scaling * (B @ A))


def as_lora(A: torch.Tensor, B: torch.Tensor, v: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    return A, scaling * v[:, None] * B


def keeps_the_law(
    update: Callable[[torch.Tensor], torch.Tensor], delta_weight: Callable[[], torch.Tensor], in_features: int
) -> bool:
    n = in_features
    inputs = [torch.zeros(1, n), torch.eye(n), -torch.eye(n), torch.randn(64, n), 100 * torch.randn(64, n)]
    for x in inputs:
        got, wanted = update(x), x @ delta_weight().T
        if got.shape != wanted.shape or float((got - wanted).abs().max()) > 1e-4 * float(wanted.abs().max()):
            return False
    return True
