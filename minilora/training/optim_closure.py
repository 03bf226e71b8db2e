"""The argument that every optimizer of torch has: a function that computes the loss again. Next file: ``training/optim_adamw8.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["loss_again"]


def loss_again(closure: Callable[[], Any] | None) -> Any:
    """What ``closure`` returns, with gradients recorded though a step records none; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
