"""What a model makes of a few tokens before a run begins: whether it reads from left to right.

Each token is learnt from those before it. A model that sees the tokens behind it as well, as encoders do (BERT, RoBERTa), would learn to
copy: its loss falls to nothing, and what it writes is worth nothing. Of a text two forms are read that differ in their last token, and
all losses before it must stay as they are. Next file: ``training/packed.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.training.guards import context_length
from minilora.training.losses import token_losses

__all__ = ["CANNOT", "LENGTH", "leak_between", "learnt", "losses_of", "refuse_reading_ahead", "rounding"]

LENGTH = 24  # tokens of an example that is looked at
# What a model raises that cannot read what it is asked.
CANNOT = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


def refuse_reading_ahead(model: nn.Module, examples: Sequence[Encoded], pad_id: int) -> None:
    """Raise ``StateError`` for a model in which a token changes the losses of those before it."""
    if any(isinstance(module, Adapter) and module.depends_on_input for module in model.modules()):
        return  # its tokens are looked for in the whole text
    length = min(LENGTH, context_length(model) or LENGTH)
    ids = (examples[0].input_ids * LENGTH)[:length]
    other = (*ids[:-1], next((token for token in ids if token != ids[-1]), int(not ids[-1])))
    try:
        one, changed = losses_of(model, [collate([learnt(form)], pad_id) for form in (ids, other)])
    except CANNOT:
        return  # the first step will say it
    leak = leak_between(model, one[:-1], changed[:-1])
    if leak and math.isfinite(leak):  # the first step says what is not finite
        raise StateError(
            f"{type(model).__name__} reads ahead: a token changes a loss before it by {leak:.2g}, so it would learn to copy what it is to "
            "predict; wanted a causal model (an encoder such as BERT is one only if its config says is_decoder=true)"
        )


def leak_between(model: nn.Module, one: Tensor, other: Tensor) -> float:
    """The largest difference of losses that must be the same, 0.0 where it is rounding."""
    if not len(one):
        return 0.0
    leak = float((one - other).abs().max())
    return 0.0 if leak <= max(rounding(model) / 4, 1e-5) * max(1.0, float(one.max())) else leak


def learnt(ids: Sequence[int]) -> Encoded:
    """An example of which every token is learnt."""
    return Encoded(tuple(ids), tuple(ids))


def losses_of(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The losses of each batch in eval mode; the model and torch's generator are left as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            return [token_losses(model, batch) for batch in batches]
    finally:
        for module, training in modes.items():
            module.training = training


def rounding(model: nn.Module) -> float:
    """Of the coarsest number format among the model's weights."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(torch.finfo(kind).eps for kind in kinds)
