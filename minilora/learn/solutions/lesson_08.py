"""Lesson 8. The kernel: one solution."""

from collections.abc import Callable

import torch


def tiled_linear(
    x: torch.Tensor, decode: Callable[[int, int], torch.Tensor], out_features: int, tile: int
) -> torch.Tensor:
    firsts = range(0, out_features, tile)
    return torch.cat([x @ decode(first, min(first + tile, out_features)).T for first in firsts], 1)


def bytes_moved(tokens: int, in_features: int, out_features: int, bits: float, itemsize: int) -> float:
    return in_features * out_features * bits / 8 + tokens * (in_features + out_features) * itemsize


def least_seconds(flops: float, moved: float, flops_per_second: float, bytes_per_second: float) -> float:
    return max(flops / flops_per_second, moved / bytes_per_second)


def turning_point(bits: float, flops_per_second: float, bytes_per_second: float) -> float:
    return (bits / 8 / bytes_per_second) / (2 / flops_per_second)
