"""Embeddings and the heads tied to them: a change of the table is shared with the head, or refused, never half applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from minilora.errors import TargetError
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.slots import Value
from minilora.lora.variants.embedding import LoRAEmbedding, TiedHead
from minilora.lora.variants.tokens import TiedRows, TokenRows

__all__ = ["adapt_embedding", "sharers", "train_rows", "untie"]


def sharers(bare: Bare, parameter: Any) -> list[str]:
    """Paths of the modules that hold this very parameter."""
    return holders(bare).get(id(parameter), [])


def holders(bare: Bare) -> dict[int, list[str]]:
    """The id of each parameter to the paths of the modules that hold it: one walk over the model."""
    found: dict[int, list[str]] = {}
    for path, module in bare.named_modules():
        for _, parameter in bare.parameters_of(module):
            found.setdefault(id(parameter), []).append(path)
    return found


def adapt_embedding(bare: Bare, path: str, layer: nn.Embedding, config: LoraConfig, kind: str) -> dict[str, Value]:
    """LoRA on an embedding, and with ``ensure_weight_tying`` the same update on a head that is tied to it.

    Raises:
        TargetError: the head is tied and the config does not say to share the change, or the variant is for linear layers only.
    """
    if kind != "lora" or config.lora_bias:
        raise TargetError(
            f"{path} is an Embedding, which takes plain LoRA only; leave it out, or give it an adapter of its own"
        )
    tied = [other for other in sharers(bare, layer.weight) if other != path]
    if tied and not config.ensure_weight_tying:
        raise TargetError(
            f"{path} shares its weight with {tied[0]}; set ensure_weight_tying=True to adapt both alike, or minilora.untie(model) first"
        )
    adapter = LoRAEmbedding(layer, config, path)
    return {path: adapter, **{other: TiedHead(bare.get_submodule(other), adapter) for other in tied}}


def train_rows(bare: Bare, path: str, indices: Sequence[int]) -> dict[str, Value]:
    """Trained rows of an embedding, shared with a head that is tied to it (as PEFT shares them)."""
    layer = bare.get_submodule(path)
    adapter = TokenRows(layer, indices, path)
    tied = [other for other in sharers(bare, layer.weight) if other != path]
    return {path: adapter, **{other: TiedRows(bare.get_submodule(other), adapter) for other in tied}}


def untie(model: nn.Module) -> nn.Module:
    """Give the output head a weight of its own (a copy) and say so in ``model.config``; does nothing to a model that ties nothing."""
    bare = Bare(model)
    head: Any = bare.get_output_embeddings()
    config: Any = getattr(model, "config", None)
    with LOCK, Change() as change:
        if head is not None and len(sharers(bare, head.weight)) > 1:
            weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            change.item(head._parameters, "weight", weight)
        for part in (config, getattr(config, "text_config", None)):
            if part is not None and hasattr(part, "tie_word_embeddings"):
                change.put(part, "tie_word_embeddings", False)
    return model
