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
from minilora.training.processes import ALONE, Processes

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
def evaluate(
    model: nn.Module,
    examples: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    processes: Processes = ALONE,
    sharded: bool = False,
) -> float:
    """Mean loss per supervised token in eval mode; the training mode is left as it was.

    Each process takes a part of the batches, and all return the same bits, whatever their number. ``sharded``: they hold parts of the
    model, so all call it equally often.
    """
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    part = processes.part(len(batches))
    most = -(-len(batches) // processes.size) if sharded else len(part)

    def own() -> list[tuple[float, int]]:
        found = []
        for turn in range(most):
            losses = token_losses(model, collate(batches[min(part.start + turn, len(batches) - 1)], pad_id))
            found.append((losses.double().sum().item(), len(losses)))
        return found[: len(part)]

    training = model.training
    model.eval()
    try:
        every = [batch for found in processes.attempt(own, sharded) for batch in found]
    finally:
        model.train(training)
    return sum(total for total, _ in every) / sum(count for _, count in every)
