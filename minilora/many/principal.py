"""Incremental principal component analysis of rows that come in batches (Ross et al. 2008, section 3.1), for EVA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

__all__ = ["Principal"]

_SEED = 42  # of the randomized SVD, so that the same data gives the same directions


class Principal:
    """The directions in which rows ``[n, in]`` vary most.

    Args:
        count: how many directions. tau: the cosine from which on a direction of two batches counts as the same.

    Attributes:
        directions: ``[count, in]`` orthonormal. sizes: ``[count]`` singular values. explained: ``[count]`` share of the variance.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau, self.seen = count, tau, 0
        self.directions, self.sizes, self.explained = torch.empty(0), torch.empty(0), torch.empty(0)
        self._mean = self._squares = torch.empty(0)
        self._same = torch.zeros(count, dtype=torch.bool)

    @property
    def ready(self) -> bool:
        """Whether there are directions."""
        return self.seen > 0

    def agrees(self, rank: int) -> bool:
        """Whether the first ``rank`` directions were the same in the last two batches."""
        return bool(self._same[:rank].all())

    def first(self, rank: int, whiten: bool) -> Tensor:
        """The first directions, divided by the roots of their singular values with ``whiten``."""
        found = self.directions[:rank].clone()
        return found / self.sizes[:rank].sqrt()[:, None] if whiten else found

    def add(self, rows: Tensor) -> bool:
        """Take in a batch; False for one of fewer rows than directions, which says nothing."""
        if len(rows) < self.count:
            return False
        mean, total = rows.mean(0), self.seen + len(rows)
        around = rows - mean
        squares = around.double().square().sum(0)
        if self.seen:
            shift = self._mean - mean
            weight = self.seen * len(rows) / total
            squares = squares + self._squares + weight * shift.double().square()
            around = torch.cat([self.sizes[:, None] * self.directions, around, weight**0.5 * shift[None]])
        S, V = _largest(around, self.count)
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        self._same = (cosine_similarity(V, self.directions) >= self.tau).cpu() if self.seen else self._same
        self._mean = mean if not self.seen else (self._mean * self.seen + mean * len(rows)) / total
        self._squares, self.seen, self.directions, self.sizes = squares, total, V, S
        self.explained = (S.double().square() / squares.sum().clamp(min=1e-30)).float()
        return True


def _largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``(S [count], V [count, in])`` by a randomized SVD."""
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(_SEED)
        _, S, V = torch.svd_lowrank(rows, q=min(2 * count, *rows.shape), niter=4)
    return S[:count], V.T[:count].contiguous()
