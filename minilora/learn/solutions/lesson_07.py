"""Lesson 7. The backward pass: one solution.

The gradient of A needs x, and that of B needs A x, r numbers a token. That of x needs weights alone.
"""

from collections.abc import Callable
from typing import Any

import torch


def gradient_of_x(g: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    return g @ W + scaling * (g @ B) @ A


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, decode: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.decode = decode
        return x @ decode().T

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g @ ctx.decode(), None


def frozen_linear(x: torch.Tensor, decode: Callable[[], torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = _Frozen.apply(x, decode)
    return out


def kept_bytes(tokens: int, in_features: int, out_features: int, r: int, itemsize: int) -> int:
    return tokens * (in_features + r) * itemsize
