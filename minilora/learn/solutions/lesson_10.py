"""Lesson 10. Many adapters: one solution."""

import torch

Adapter = tuple[torch.Tensor, torch.Tensor, float]


def stacked(adapters: list[Adapter]) -> tuple[torch.Tensor, torch.Tensor]:
    R = max(len(A) for A, _, _ in adapters)
    first_A, first_B, _ = adapters[0]
    stack_A = torch.zeros(len(adapters) + 1, R, first_A.shape[1])
    stack_B = torch.zeros(len(adapters) + 1, first_B.shape[0], R)
    for place, (A, B, scaling) in enumerate(adapters):
        stack_A[place, : len(A)] = A
        stack_B[place, :, : len(A)] = scaling * B
    return stack_A, stack_B


def mixed(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    thin = torch.bmm(x, A[pick].transpose(1, 2))
    return x @ W.T + torch.bmm(thin, B[pick].transpose(1, 2))


def added(adapters: list[Adapter], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    columns = [weight * scaling * B for (_, B, scaling), weight in zip(adapters, weights, strict=True)]
    return torch.cat([A for A, _, _ in adapters]), torch.cat(columns, 1)
