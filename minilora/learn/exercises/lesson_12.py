"""Lesson 12. Reading a fine-tuning.

What do the singular values of an update, the directions that are new, and a sweep of learning rates say? Fill in the functions;
``minilora learn check 12`` looks at them.
"""

import torch


def spectrum(A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The singular values of scaling B A, largest first, fp32 [min(r, in, out)], without forming the matrix [out, in].

    A is [r, in], B [out, r], fp32. QR decompositions of B and of A^T leave a matrix of r rows. Compute in fp64.
    """
    raise NotImplementedError


def effective_rank(values: torch.Tensor) -> float:
    """exp(-sum p log p), p the singular values divided by their sum (Roy and Vetterli 2007); 0.0 where all are zero.

    values is fp32 [n], none below zero; a value of zero adds nothing.
    """
    raise NotImplementedError


def newness(W: torch.Tensor, delta: torch.Tensor, top_k: int) -> torch.Tensor:
    """How close the first left singular vectors of W + delta come to any of W, fp32 [top_k]: the largest |cosine| of each.

    One that is far below 1 is an intruder (Shuttleworth et al. 2024, arXiv 2410.21228). W and delta are [out, in] fp32.
    """
    raise NotImplementedError


def best_rate(losses: dict[float, list[float]]) -> float:
    """The learning rate whose mean loss over the seeds is lowest, from {rate: [loss of each seed]}.

    A rate of which a seed diverged (its loss is NaN or infinite) is never chosen. Of two alike the smaller rate is safer. Raises ValueError
    where no rate is left.
    """
    raise NotImplementedError
