"""Mutants that only one kind of input shows: ties, odd tails, groups, blocks of zeros, the last bit."""

from __future__ import annotations

from minilora.learn.mutant import Mutant

__all__ = ["HARD"]

_SCALED = """
import torch
from minilora.quant.codebooks import NF4


def show():
    middle = NF4.thresholds()[0][9]
    return torch.stack([middle]){moved}, NF4
"""
_FACTORS = """
import torch


def show():
    return torch.ones(2, 3), torch.ones(4, {columns}), 4
"""
_SCALES = """
import torch


def show():
    absmax = torch.ones({count})
    return absmax, "weight"
"""
_TAIL = """
import torch
from minilora.quant.codebooks import NF4


def show():
    return torch.tensor([{value}, {scale}]), NF4, 64, torch.tensor([{scale}])
"""

HARD = (
    Mutant(
        "many.arithmetic:calculate_majority_sign_mask",
        "`calculate_majority_sign_mask` elects a sign at each place, and says which of the stacked values have it.",
        "votes >= 0",
        "votes > 0",
        witness="import torch\n\n\ndef show():\n    return (torch.tensor([[1.0], [-1.0]]),)\n",
        plain="import torch\n\n\ndef show():\n    return (torch.tensor([[2.0], [-1.0]]),)\n",
    ),
    Mutant(
        "many.arithmetic:disjoint_merge",
        "`disjoint_merge` is the mean of those of the stacked values that a mask names.",
        ".clamp(min=1)",
        "",
        witness="import torch\n\n\ndef show():\n    return torch.ones(2, 1), torch.tensor([[False], [False]])\n",
        plain="import torch\n\n\ndef show():\n    return torch.ones(2, 1), torch.tensor([[True], [False]])\n",
    ),
    Mutant(
        "lora.factors:widened",
        "`widened` gives a pair of factors more rank without changing its product, also for a convolution in groups.",
        "more // groups",
        "more",
        witness=_FACTORS.format(columns=1),
        plain=_FACTORS.format(columns=2),
    ),
    Mutant(
        "quant.lookup:nearest_code_reference",
        "`nearest_code_reference` finds the code of the level that is nearest to each value.",
        "torch.bucketize(scaled, midpoints.to(place))",
        "torch.bucketize(scaled, midpoints.to(place), right=True)",
        witness=_SCALED.format(moved=""),
        plain=_SCALED.format(moved=" + 0.01"),
        makes="from minilora.quant.codebooks import NF4",
    ),
    Mutant(
        "quant.blockwise:_packed",
        "`_packed` packs codes into bytes, with the code of zero behind an odd number of them.",
        "value=zero",
        "value=0",
        witness="import torch\n\n\ndef show():\n    return torch.tensor([1, 2, 3], dtype=torch.uint8), 4, 7\n",
        plain="import torch\n\n\ndef show():\n    return torch.tensor([1, 2], dtype=torch.uint8), 4, 7\n",
    ),
    Mutant(
        "quant.nested:has_outlier",
        "`has_outlier` says whether one scale is so large that the others around it would be lost in 8 bits.",
        "torch.where(padded > 0, padded, torch.nan).nanmedian(1)",
        "padded.nanmedian(1)",
        witness=_SCALES.format(count=5),
        plain=_SCALES.format(count=256),
    ),
    Mutant(
        "quant.blockwise:_codes",
        "`_codes` divides weights by the scale of their block, and takes the code of the nearest level.",
        "values[whole:] / guarded(scales[-1])",
        "values[whole:] * guarded(scales[-1]).reciprocal()",
        witness=_TAIL.format(value=0.29493391513824463, scale=1.01),
        plain=_TAIL.format(value=0.5, scale=2.0),
        makes="from minilora.quant.codebooks import NF4",
    ),
)
