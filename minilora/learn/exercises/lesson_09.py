"""Lesson 9. Merging, and what rounding eats.

A merged weight is W + delta in the dtype of W. Numbers of bf16 lie 2^-8 to 2^-7 of their size apart, so an update that is much
smaller is rounded away. Fill in the functions; ``minilora learn check 9`` looks at them.
"""

import torch


def merged(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling B A in the dtype of W, computed in fp32 and rounded once.

    W is [out, in] in fp32, fp16 or bf16; A [r, in] and B [out, r] are fp32.
    """
    raise NotImplementedError


def eaten(W: torch.Tensor, delta: torch.Tensor) -> float:
    """The share of the entries of ``delta`` that are not zero and change nothing: W + delta rounds to W.

    W is [out, in] in any floating dtype, delta fp32 of the same shape. 0.0 where delta is zero everywhere.
    """
    raise NotImplementedError


def lost(before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor) -> float:
    """How much of an update a merge lost: the norm of what arrived less the update, divided by the norm of the update.

    ``after`` - ``before`` is what arrived; 0.0 is a perfect merge, and 1.0 is what one that changes nothing has. All are [out, in];
    compute in fp64, and return a float.
    """
    raise NotImplementedError
