"""Tables that are computed once. Next file: ``quant/codebooks.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
__all__ = ["constant"]


def constant(make: Callable[P, T]) -> Callable[P, T]:
    """Decorator of a function that returns a constant tensor: computed once, on the CPU.

    The first caller may stand in ``torch.device("meta")``, as a loading model does, or in inference mode; the constant must not.
    """

    @functools.lru_cache(maxsize=64)
    @functools.wraps(make)
    def once(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        with torch.device("cpu"), torch.inference_mode(False):
            return make(*args, **kwargs)

    return once  # type: ignore[return-value]
