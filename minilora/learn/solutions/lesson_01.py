"""Lesson 1. What a low rank is: one solution."""

import torch


def best_of_rank(W: torch.Tensor, r: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def factors(W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return Vh[:r], U[:, :r] * S[:r]


def captured(W: torch.Tensor, r: int) -> float:
    energy = torch.linalg.svdvals(W.double()).square()
    return float(energy[:r].sum() / energy.sum())


def numbers_saved(out_features: int, in_features: int, r: int) -> int:
    return out_features * in_features - r * (in_features + out_features)
