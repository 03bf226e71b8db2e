"""The loss: cross-entropy of the supervised tokens, with logits computed at their positions only. Next file: ``training/schedule.py``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED

__all__ = ["evaluate", "token_losses"]


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of every supervised token of a batch, fp32 ``[tokens]``.

    Args:
        model: returns an object with ``logits [batch, length, vocabulary]``; is asked for the needed positions only if it can be
            (``logits_to_keep``, as transformers' models).
        batch: as ``collate`` makes it.
    """
    device = next(model.parameters()).device
    targets = batch["labels"][:, 1:].to(device)
    wanted = (targets != IGNORED).any(0).nonzero().squeeze(1)
    options: dict[str, Any] = {
        "input_ids": batch["input_ids"].to(device),
        "attention_mask": batch["attention_mask"].to(device),
    }
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        options["use_cache"] = False
    can_skip = "logits_to_keep" in accepted
    logits = model(**options, logits_to_keep=wanted).logits if can_skip else model(**options).logits[:, wanted]
    targets = targets[:, wanted]
    counts = targets != IGNORED
    return F.cross_entropy(logits[counts].float(), targets[counts], reduction="none")


@torch.no_grad()
def evaluate(model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad_id: int) -> float:
    """Mean loss per supervised token in eval mode; the training mode is left as it was."""
    training = model.training
    model.eval()
    try:
        batches = (collate(examples[i : i + batch_size], pad_id) for i in range(0, len(examples), batch_size))
        losses = torch.cat([token_losses(model, batch) for batch in batches])
    finally:
        model.train(training)
    return losses.mean().item()
