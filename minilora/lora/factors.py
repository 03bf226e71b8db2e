"""Pairs of factors ``(A, B)`` of an update ``B A``: another rank, the same product. Next file: ``lora/variants/residual.py``.

``A [r, ...]`` and ``B [out, r, ...]``; in a convolution of several groups ``B [out, r / groups, ...]`` sees the rows of A that belong to
its group, so what is added to A is shared out among the groups. Of experts ``A [E, r, in]`` and ``B [E, out, r]``: a pair for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["beside", "widened"]


def beside(A: Tensor, B: Tensor, more_A: Tensor, more_B: Tensor, experts: bool = False) -> tuple[Tensor, Tensor]:
    """One pair for the sum of two updates, in the layout of the first: ``[A; more_A]`` and ``[B, more_B]``, group by group."""
    if experts:
        return torch.cat([A, more_A], 1), torch.cat([B, more_B], 2)
    groups = len(A) // B.shape[1]
    rows = [each.unflatten(0, (groups, -1)) for each in (A, more_A)]
    return torch.cat(rows, 1).flatten(0, 1), torch.cat([B, more_B], 1)


def widened(A: Tensor, B: Tensor, r: int, experts: bool = False) -> tuple[Tensor, Tensor]:
    """The same update at a larger rank, a multiple of the groups: the rest is zeros."""
    if experts:
        more = r - A.shape[1]
        return beside(A, B, A.new_zeros(len(A), more, A.shape[2]), B.new_zeros(*B.shape[:2], more), True)
    groups = len(A) // B.shape[1]
    more = r - len(A)
    return beside(A, B, A.new_zeros(more, *A.shape[1:]), B.new_zeros(len(B), more // groups, *B.shape[2:]))
