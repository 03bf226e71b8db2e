"""Lesson 1. What a low rank is.

How few numbers can hold most of a matrix? The singular value decomposition W = U diag(S) Vh answers it: the first r singular values with
their directions are the best matrix of rank r (Eckart and Young 1936). Fill in the functions; ``minilora learn check 1`` looks at them.
"""

import torch


def best_of_rank(W: torch.Tensor, r: int) -> torch.Tensor:
    """The matrix of rank r that is nearest to W.

    W is [out, in] fp32, 1 <= r <= min(out, in). Returns [out, in] fp32.
    """
    raise NotImplementedError


def factors(W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same matrix as two thin ones: (A [r, in], B [out, r]) with B A = best_of_rank(W, r).

    All of the size goes into B: each row of A has length 1. fp32.
    """
    raise NotImplementedError


def captured(W: torch.Tensor, r: int) -> float:
    """The share of W's squared Frobenius norm that the best matrix of rank r has, from 0 to 1, as a Python float."""
    raise NotImplementedError


def numbers_saved(out_features: int, in_features: int, r: int) -> int:
    """How many numbers fewer than W [out, in] the two factors of rank r have. It may be below zero."""
    raise NotImplementedError
