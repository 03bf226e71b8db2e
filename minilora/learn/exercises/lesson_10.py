"""Lesson 10. Many adapters.

Several adapters lie in stacks, and each row of a batch picks its own; two of them are added up exactly by laying their factors side by
side. An adapter is (A [r, in], B [out, r], scaling), fp32; ranks may differ. Fill in the functions; ``minilora learn check 10`` looks at
them.
"""

import torch

Adapter = tuple[torch.Tensor, torch.Tensor, float]


def stacked(adapters: list[Adapter]) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [n + 1, R, in], B [n + 1, out, R]) for n adapters, R the largest of their ranks.

    B is multiplied by the scaling. Ranks that are missing are zeros. The last of each stack is all zeros: for rows without an adapter.
    """
    raise NotImplementedError


def mixed(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    """W x plus, for row i of the batch, the update of adapter pick[i], without a loop over rows or adapters.

    x is [rows, tokens, in], W [out, in], A and B as ``stacked`` makes them, pick [rows] int64. Returns [rows, tokens, out].
    """
    raise NotImplementedError


def added(adapters: list[Adapter], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair (A [sum of the ranks, in], B [out, sum of the ranks]) whose B A is the weighted sum of the adapters' updates.

    An update is scaling B A. Weights may be negative.
    """
    raise NotImplementedError
