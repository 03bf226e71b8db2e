"""Embeddings and the heads tied to them: a change of the table is shared with the head, or refused, never half applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from minilora.errors import TargetError
from minilora.lora.adapter import Adapter
from minilora.lora.config import LoraConfig
from minilora.lora.slots import Value
from minilora.lora.variants.embedding import LoRAEmbedding, TiedHead
from minilora.lora.variants.tokens import TiedRows, TokenRows

__all__ = ["adapt_embedding", "sharers", "train_rows", "untie"]


def sharers(model: nn.Module, parameter: Any) -> list[str]:
    """Paths of the modules that hold this very parameter."""
    return [path for path, module in model.named_modules() if any(p is parameter for p in module._parameters.values())]


def adapt_embedding(
    model: nn.Module, path: str, layer: nn.Embedding, config: LoraConfig, kind: str
) -> dict[str, Value]:
    """LoRA on an embedding, and with ``ensure_weight_tying`` the same update on a head that is tied to it.

    Raises:
        TargetError: the head is tied and the config does not say to share the change, or the variant is for linear layers only.
    """
    if kind != "lora" or config.lora_bias:
        raise TargetError(
            f"{path} is an Embedding, which takes plain LoRA only; leave it out, or give it an adapter of its own"
        )
    tied = [other for other in sharers(model, layer.weight) if other != path]
    if tied and not config.ensure_weight_tying:
        raise TargetError(
            f"{path} shares its weight with {tied[0]}; set ensure_weight_tying=True to adapt both alike, or minilora.untie(model) first"
        )
    adapter = LoRAEmbedding(layer, config, path)
    return {path: adapter, **{other: TiedHead(model.get_submodule(other), adapter) for other in tied}}


def train_rows(model: nn.Module, path: str, indices: Sequence[int]) -> dict[str, Value]:
    """Trained rows of an embedding, shared with a head that is tied to it (as PEFT shares them)."""
    layer = model.get_submodule(path)
    adapter = TokenRows(layer, indices, path)
    tied = [other for other in sharers(model, layer.weight) if other != path]
    return {path: adapter, **{other: TiedRows(model.get_submodule(other), adapter) for other in tied}}


def untie(model: nn.Module) -> nn.Module:
    """Give the output head a weight of its own (a copy) and say so in ``model.config``; does nothing to a model that ties nothing."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inner: Any = head.innermost if isinstance(head, Adapter) else head
    if inner is not None and len(sharers(model, inner.weight)) > 1:
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=inner.weight.requires_grad)
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    return model
