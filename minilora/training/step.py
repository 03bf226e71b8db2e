"""The gradients of one step, and what is wrong with them.

The loss is the mean over the supervised tokens of a whole step: with accumulation the micro-batches are weighted by their tokens, so that
cutting a batch in two changes nothing, and packing examples into rows neither. Next file: ``training/memory.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from minilora.data.batches import Collate, collate
from minilora.data.encoding import Encoded
from minilora.training.guards import first_nonfinite_gradient, first_nonfinite_output
from minilora.training.losses import token_losses

__all__ = ["gradients", "why_not_begun"]


def gradients(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    batches: Sequence[Sequence[Encoded]],
    pad_id: int,
    tensors: Collate = collate,
) -> tuple[float, Tensor, str | None]:
    """Add the gradients of a step to ``named``, over its micro-batches, of which ``tensors`` makes what the model is called with.

    Returns:
        The step's loss, the norm of all gradients (0-dimensional), and what is not finite, in words, or None. Where it is the loss, no
        more micro-batches are tried.
    """
    supervised = sum(example.supervised for batch in batches for example in batch)
    total = 0.0
    for number, examples in enumerate(batches, 1):
        batch = tensors(examples, pad_id)
        loss = token_losses(model, batch).sum() / supervised
        loss.backward()
        total += loss.item()
        if not math.isfinite(total):
            return total, loss.detach(), _why_loss(model, total, number, batch)
    norm = nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None])
    if math.isfinite(float(norm)):
        return total, norm, None
    first = first_nonfinite_gradient(named.items())
    said = f"the gradient of {first} is not finite" if first else "the gradients are finite, their norm overflows"
    return total, norm, f"{said} (loss {total:.4g})"


def _why_loss(model: nn.Module, total: float, number: int, batch: dict[str, Tensor]) -> str:
    first = first_nonfinite_output(model, lambda: token_losses(model, batch))
    where = f"{first} is the first to return NaN or infinity" if first else "every module returns finite values"
    return f"the loss is {total} in micro-batch {number}; {where}"


def why_not_begun(problem: str | None) -> str:
    """Why a run stops at its first step: ``problem`` of ``gradients``, or None where they are all zero."""
    if problem:
        return f"the first step has no finite gradient: {problem}; look at the base model's weights, its dtype and the first examples"
    return "the first gradient is zero everywhere, so nothing would train; does the loss depend on an adapted layer?"
