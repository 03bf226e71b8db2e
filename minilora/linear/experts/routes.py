"""Which tokens go to which expert: the router's choice, sorted so that every expert's rows lie together.

    top_k_index [T, k]  --sort-->  expert 0: rows 0..3 | expert 2: rows 3..4 | ...      (an expert may get none)

A grouped product then takes each expert's weight once, for all of its rows. Next file: ``linear/experts/layers.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Routes", "route"]


@dataclass(frozen=True, eq=False)
class Routes:
    """Pairs of a token and one of its experts, sorted by expert.

    Attributes:
        order: ``[S]`` int64, for every sorted row its place among the pairs as the router gave them; ``S = T * k``.
        ids: ``[S]`` int64, the expert of every sorted row; rows of no expert (an index beyond the last one) stand behind all others.
        ends: ``[E]`` int32, where the rows of each expert end; those of expert e begin where those of e - 1 end.
        choices: k, experts for each token.
        places: ``[S]`` int64, the token of the batch of every sorted row, where ``order`` does not say it. batch: how many tokens there
            are then; 0 where nobody knows which row is whose.
    """

    order: Tensor
    ids: Tensor
    ends: Tensor
    choices: int = 1
    places: Tensor | None = None
    batch: int | None = None

    @property
    def in_batch(self) -> tuple[Tensor, int] | None:
        """The token of the batch of every sorted row, ``[S]``, and how many there are; None where that is not known."""
        if self.batch == 0:
            return None
        if self.places is not None and self.batch is not None:
            return self.places, self.batch
        return self.tokens, len(self.order) // self.choices

    @property
    def tokens(self) -> Tensor:
        """The token of every sorted row, ``[S]``."""
        return self.order if self.choices == 1 else self.order // self.choices

    @functools.cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """``(expert, first row, last row)`` of the experts that have rows. A GPU is asked once, and waited for.

        On paper, where there are no values, every expert gets as many rows as any other.
        """
        rows, count = len(self.order), len(self.ends)
        even = [rows * (expert + 1) // count for expert in range(count)]
        found, first = [], 0
        for expert, last in enumerate(even if isinstance(self.ends, FakeTensor) else self.ends.tolist()):
            if last > first:
                found.append((expert, first, last))
            first = last
        return found

    @property
    def experts(self) -> list[int]:
        """Those that have rows."""
        return [expert for expert, _, _ in self.spans]

    def of_experts(self, values: Tensor) -> Tensor:
        """``values [E, ...]`` for every sorted row, ``[S, ...]``; rows of no expert get those of the last one."""
        return values[self.ids.clamp(max=len(values) - 1)]


def route(index: Tensor, experts: int) -> Routes:
    """The routes of ``index [T, k]``, the experts that a router chose; an index from ``experts`` on means none. Nothing waits for a GPU."""
    ids, order = index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
    return Routes(order, ids, ends.int(), index.shape[-1] if index.dim() > 1 else 1)
