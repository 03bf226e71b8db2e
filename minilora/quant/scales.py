"""Better weights in the same bytes: choose the scale of a block by its error instead of its largest value.

Storage and decoding do not change; a file quantized so is read by anything that reads absmax-quantized ones. ``mse`` takes the least
squared error of the weights, ``weighted`` of the layer's output: an error in a weight counts with E[x^2] of its input channel, which
``calibrate`` gathers. For each trial scale the codes are fixed, the best scale for these codes is computed (weighted least squares),
and the trial of least error wins; absmax itself is among the trials, so no block gets worse. Next file: ``quant/blockwise.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.quant.codebooks import Codebook
from minilora.quant.lookup import nearest_code

TINY = 1e-38  # guards the reciprocal of a zero block, as bitsandbytes does


def absmax_scales(blocks: Tensor, book: Codebook) -> Tensor:
    """Largest magnitude of each block, fp32 ``[n]``; with the value's own sign for a codebook made so."""
    largest = blocks.abs().amax(1)
    if not book.signed:
        return largest
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)


def searched_scales(blocks: Tensor, book: Codebook, importance: Tensor | None, signed: bool) -> Tensor:
    """The scale of least (weighted) squared error for each block.

    Args:
        blocks: fp32 ``[n, blocksize]``. importance: non-negative, same shape, or None for all ones.
        signed: try negative scales too, which turn an asymmetric table round.

    Returns:
        fp32 ``[n]``.
    """
    start = absmax_scales(blocks, book)
    levels, mass = book.table(blocks.device), importance
    best_error = torch.full_like(start, float("inf"))
    best = start.clone()
    low = 0.5 if book.bits >= 4 else 0.35  # with few levels it pays to clip more
    trials = [step / 20 for step in range(round(low * 20), 23)]
    for factor in [1.0, *(t for t in trials if t != 1.0)] + ([-t for t in trials] if signed else []):
        trial = start * factor
        decoded = levels[nearest_code(_divide(blocks, trial), book).long()]
        heavy = decoded if mass is None else decoded * mass
        scale = (heavy * blocks).sum(1) / (heavy * decoded).sum(1).clamp(min=TINY)
        for candidate in (scale, trial) if factor == 1.0 else (scale,):
            error = (blocks - decoded * candidate.unsqueeze(1)).square()
            error = (error if mass is None else error * mass).sum(1)
            better = (error < best_error) & torch.isfinite(candidate)
            best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
    return best


def _divide(blocks: Tensor, scale: Tensor) -> Tensor:
    """``blocks / scale`` as bitsandbytes divides: times the guarded reciprocal, kept in [-1, 1]."""
    return (blocks * guarded(scale).reciprocal().unsqueeze(1)).clamp_(-1, 1)


def guarded(scale: Tensor) -> Tensor:
    """Scales as divisors: a block of zeros is divided by a tiny number instead of zero."""
    return torch.where(scale.abs() < TINY, torch.full_like(scale, TINY), scale)
