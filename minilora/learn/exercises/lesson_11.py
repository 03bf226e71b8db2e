"""Lesson 11. Your own variant: the law fails, then holds.

Whatever a variant does in its forward, what it adds to the weight when it is merged must do the same: update(x) = x delta_weight^T for
every x. The variant of this lesson has a volume v [out], a trained number for each output:

    y = W x + v * (scaling B A x)

Fill in the functions; ``minilora learn check 11`` looks at them.
"""

from collections.abc import Callable

import torch


def update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """What is added to W x. x is [..., in], A [r, in], B [out, r], v [out], fp32. Returns [..., out]."""
    raise NotImplementedError


def delta_weight(A: torch.Tensor, B: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """What is added to W, [out, in]."""
    raise NotImplementedError


def as_lora(A: torch.Tensor, B: torch.Tensor, v: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same update as a plain LoRA (A [r, in], B [out, r]) of scaling 1, for programs that do not know the variant."""
    raise NotImplementedError


def keeps_the_law(
    update: Callable[[torch.Tensor], torch.Tensor], delta_weight: Callable[[], torch.Tensor], in_features: int
) -> bool:
    """Whether a variant keeps the law, to a share of 1e-4 of the largest output: a test of any variant by its two functions.

    update(x) takes [rows, in] fp32 and returns [rows, out]. delta_weight() returns [out, in]. A variant may be wrong for large inputs
    only, or for small ones, or for one sign; or its answer for a row may depend on the other rows.
    """
    raise NotImplementedError
