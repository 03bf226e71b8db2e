"""Lesson 11. Your own variant: one solution.

An update that is linear in x is known from its values at the unit vectors, and that of zero; one that is not (a clamp, a bias) shows at
large or random inputs, so all of them are tried.
"""

from collections.abc import Callable

import torch


def update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, d: torch.Tensor, scaling: float) -> torch.Tensor:
    return d * (scaling * (x @ A.T @ B.T))


def delta_weight(A: torch.Tensor, B: torch.Tensor, d: torch.Tensor, scaling: float) -> torch.Tensor:
    return d[:, None] * (scaling * (B @ A))


def as_lora(A: torch.Tensor, B: torch.Tensor, d: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    return A, scaling * d[:, None] * B


def keeps_the_law(
    update: Callable[[torch.Tensor], torch.Tensor], delta_weight: Callable[[], torch.Tensor], in_features: int
) -> bool:
    units = torch.eye(in_features)
    x = torch.cat([units, -units, torch.randn(64, in_features), 100 * torch.randn(64, in_features)])
    for rows in (torch.zeros(1, in_features), *x.split(1)):
        got, wanted = update(rows), rows @ delta_weight().T
        if got.shape != wanted.shape or float((got - wanted).abs().max()) > 1e-4 * float(wanted.abs().max()):
            return False
    return True
