"""Lesson 9. Merging: one solution."""

import torch


def merged(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    return (W.float() + scaling * (B @ A)).to(W.dtype)


def eaten(W: torch.Tensor, delta: torch.Tensor) -> float:
    moves = delta != 0
    if not moves.any():
        return 0.0
    same = (W.float() + delta).to(W.dtype) == W
    return float(same[moves].double().mean())


def lost(before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor) -> float:
    wanted = delta.double()
    arrived = after.double() - before.double()
    return float((arrived - wanted).norm() / wanted.norm())
