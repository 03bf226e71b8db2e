"""Lesson 2. LoRA in twenty lines: one solution.

With B = 0 the gradient of A is zero in the first step, and that of B is not, because A is random; with both at zero nothing would ever
train. The division by r keeps the size of the update about the same when r is changed.
"""

import torch


def start(in_features: int, out_features: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(r, in_features) / r, torch.zeros(out_features, r)


def forward(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, lora_alpha: float) -> torch.Tensor:
    return x @ W.T + (lora_alpha / len(A)) * (x @ A.T @ B.T)


def delta_weight(A: torch.Tensor, B: torch.Tensor, lora_alpha: float) -> torch.Tensor:
    return (lora_alpha / len(A)) * (B @ A)


def gradients(
    x: torch.Tensor, g: torch.Tensor, A: torch.Tensor, B: torch.Tensor, lora_alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = lora_alpha / len(A)
    return scaling * (g @ B).T @ x, scaling * g.T @ (x @ A.T)
