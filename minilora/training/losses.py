"""The loss: cross-entropy of the supervised tokens, with no logits of other positions, and of theirs a few at a time.

Next file: ``training/settings.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minilora.data.batches import Collate, collate
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.training.chunked import cross_entropy
from minilora.training.head import ask, ask_for_losses, why_all_logits
from minilora.training.processes import ALONE, Processes

__all__ = ["evaluate", "losses_by_token", "token_losses"]


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of every supervised token of a batch, fp32 ``[tokens]``, in the order of its rows.

    Args:
        model: returns an object with ``logits [batch, length, vocabulary]``; is asked for the needed positions only if it can be
            (``logits_to_keep``, as transformers' models), and for no logits at all where its head can become the loss (``head.py``).
        batch: as ``collate`` or ``collate_packed`` makes it.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    targets = batch["labels"][:, 1:]
    wanted = (targets != IGNORED).any(0).nonzero().squeeze(1)
    targets = targets[:, wanted]
    counts = targets != IGNORED
    if why_all_logits(model) is None:
        return ask_for_losses(model, batch, wanted, counts)
    return cross_entropy(ask(model, batch, wanted)[counts], targets[counts])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    processes: Processes = ALONE,
    sharded: bool = False,
    tensors: Collate = collate,
) -> float:
    """Mean loss per supervised token in eval mode; the training mode is left as it was.

    Each process takes a part of the batches, and all return the same bits, whatever their number. ``sharded``: they hold parts of the
    model, so all call it equally often. ``tensors`` makes each batch.
    """
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    part = processes.part(len(batches))
    most = -(-len(batches) // processes.size) if sharded else len(part)

    def own() -> list[tuple[float, int]]:
        found = []
        for turn in range(most):
            losses = token_losses(model, tensors(batches[min(part.start + turn, len(batches) - 1)], pad_id))
            found.append((losses.double().sum().item(), len(losses)))
        return found[: len(part)]

    training = model.training
    model.eval()
    try:
        every = [batch for found in processes.attempt(own, sharded) for batch in found]
    finally:
        model.train(training)
    return sum(total for total, _ in every) / sum(count for _, count in every)


@torch.no_grad()
def losses_by_token(model: nn.Module, examples: Sequence[Encoded], pad_id: int) -> list[list[float | None]]:
    """Cross-entropy in nats of every token of each example, also of those that do not count, in eval mode.

    The loss of a token is that of predicting it from those before it; the first has none (None). Examples go through the model one after
    the other, without gradients; the training mode is left as it was.
    """
    training = model.training
    model.eval()
    try:
        found: list[list[float | None]] = []
        for example in examples:
            every = Encoded(example.input_ids, example.input_ids)  # each token is its own label
            alone = len(every.input_ids) == 1  # nothing is predicted
            found.append([None, *([] if alone else token_losses(model, collate([every], pad_id)).tolist())])
        return found
    finally:
        model.train(training)
