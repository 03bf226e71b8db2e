"""Weights that several modules share: a change of one is shared with the others, or refused, never half applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from minilora.errors import StateError, TargetError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import Adapter
from minilora.lora.config import LoraConfig
from minilora.lora.copies import share_parameters, trained_bias, trained_copy
from minilora.lora.slots import Adapters, Value, unwrapped
from minilora.lora.variants.embedding import LoRAEmbedding, Tied, TiedEmbedding, TiedHead
from minilora.lora.variants.tokens import HeadRows, TiedRows, TiedTable, TokenRows

__all__ = [
    "adapt_embedding",
    "copy_biases",
    "copy_modules",
    "has_parted",
    "refuse_shared",
    "say_untied",
    "share_again",
    "sharers",
    "trained_rows",
    "untie",
]


def sharers(model: nn.Module, parameter: Any) -> list[str]:
    """Paths of the modules that hold this very parameter."""
    return [
        path
        for path, module in unwrapped(model).named_modules()
        if any(p is parameter for p in module._parameters.values())
    ]


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
    return {path: adapter, **_twins(model, tied, adapter, TiedEmbedding, TiedHead)}


def _twins(
    model: nn.Module, paths: Sequence[str], source: Adapter, table: type[Tied], head: type[Tied]
) -> dict[str, Value]:
    """What goes around the other modules that hold the same weight: ``table`` around embeddings, ``head`` around linear layers."""
    layers = {path: model.get_submodule(path) for path in paths}
    return {path: (table if isinstance(layer, nn.Embedding) else head)(layer, source) for path, layer in layers.items()}


def copy_modules(model: nn.Module, paths: Sequence[str], config: LoraConfig) -> dict[str, Value]:
    """Copies of the modules that train whole, and with ``ensure_weight_tying`` of the modules tied to them, which share the copy's numbers.

    Raises:
        TargetError: one object stands in several places, or shares its weight with another table (T5's ``shared``, which the model may
            never call) and the config does not say to share the change.
    """
    places = [(path, module) for path, module in model.named_modules(remove_duplicate=False)]
    values: dict[str, Value] = {}
    for path in paths:
        if path in values:
            continue
        module = model.get_submodule(path)
        if again := [other for other, same in places if same is module and other != path]:
            raise TargetError(f"modules_to_save: {path} and {again[0]} are one shared module; give each its own copy")
        own = {id(parameter) for parameter in module.parameters()}
        inside = {id(part) for part in module.modules()}
        twins = [
            other
            for other, part in model.named_modules()
            if id(part) not in inside and own & {id(parameter) for parameter in part._parameters.values()}
        ]
        if config.ensure_weight_tying:
            values[path] = new = trained_copy(module)
            values |= dict(zip(twins, share_parameters(new, module, map(model.get_submodule, twins)), strict=True))
            continue
        tables = [
            other for other in twins if isinstance(model.get_submodule(other), nn.Embedding) and other not in paths
        ]
        if tables and isinstance(module, nn.Embedding):
            raise TargetError(
                f"modules_to_save: {path} shares its weight with {tables[0]}, which would stay; set ensure_weight_tying=True to train "
                "them as one, or minilora.untie(model) first"
            )
        values[path] = trained_copy(module)
    return values


def copy_biases(model: nn.Module, paths: Sequence[str]) -> dict[str, Value]:
    """Copies of the biases that train; a bias that several modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for path in paths:
        bias = model.get_parameter(path)
        if id(bias) not in made:
            made[id(bias)] = trained_bias(bias)
    return {path: made[id(model.get_parameter(path))] for path in paths}


def trained_rows(
    model: nn.Module, path: str, indices: Sequence[int], made: Mapping[str, Value], config: LoraConfig
) -> dict[str, Value]:
    """Trained rows of an embedding, shared with all that is tied to it (as PEFT shares them); or those of an output head.

    Args:
        made: what there is of the adapter already. A head that came along with its table keeps that one's rows if they are the same.

    Raises:
        TargetError: ``ensure_weight_tying``, and a tied layer is to train other rows than its table.
    """
    layer = model.get_submodule(path)
    if isinstance(known := made.get(path), Tied):
        if list(indices) == known.source.token_indices.tolist():
            return {}
        if config.ensure_weight_tying:
            raise TargetError(
                f"trainable_token_indices: {path} is tied to a table of which other rows train; name the same rows, or set "
                "ensure_weight_tying=False"
            )
    if not isinstance(layer, nn.Embedding):
        return {path: HeadRows(layer, indices, path)}
    adapter = TokenRows(layer, indices, path)
    tied = [other for other in sharers(model, layer.weight) if other != path]
    return {path: adapter, **_twins(model, tied, adapter, TiedTable, TiedRows)}


def refuse_shared(model: nn.Module, adapters: Adapters, folded: Mapping[str, Any]) -> None:
    """A weight that two layers share must change in both, or saving and reloading would give another model."""
    for path in folded:
        base = adapters.slots[path].base
        others = [other for other in sharers(model, base._parameters["weight"]) if other not in folded]  # type: ignore[union-attr]
        if others:
            raise StateError(
                f"{path} shares its weight with {others[0]}, which would not change; call minilora.untie(model) first"
            )


def has_parted(model: nn.Module, adapters: Adapters, names: Sequence[str]) -> bool:
    """Whether one of these adapters trains a copy whose weight another module shared, and which is not the same one any more."""
    copies = {
        path: value
        for path, slot in adapters.slots.items()
        for name in names
        if isinstance(value := slot.kept.get(name), nn.Module) and not isinstance(value, Adapter)
    }
    with adapters.bare():
        for path, value in copies.items():
            base: nn.Module = adapters.slots[path].base  # type: ignore[assignment]
            inside = {id(part) for part in base.modules()}
            for old, new in zip(base.parameters(), value.parameters(), strict=True):
                others = [
                    other for other in sharers(model, old) if id(unwrapped(model).get_submodule(other)) not in inside
                ]
                twins = [copies.get(other, nn.Identity()) for other in others]
                if not all(any(parameter is new for parameter in twin.parameters()) for twin in twins):
                    return True
    return False


def share_again(adapters: Adapters, layers: Mapping[str, nn.Module]) -> None:
    """Layers that shared a weight share the merged one. Raises ``StateError`` where their updates make two of it."""
    first: dict[int, str] = {}
    for path, layer in layers.items():
        twin = first.setdefault(id(adapters.slots[path].base._parameters["weight"]), path)  # type: ignore[union-attr]
        if twin == path:
            continue
        if not torch.equal(dense_weight(layer), dense_weight(layers[twin])):
            raise StateError(
                f"{path} shares its weight with {twin} and their updates differ, so one weight cannot hold both; call "
                "minilora.untie(model) first, or adapt only one of them (ensure_weight_tying=True adapts an embedding and its head alike)"
            )
        layer._parameters["weight"] = layers[twin]._parameters["weight"]


def untie(model: nn.Module) -> nn.Module:
    """Give the output head a weight of its own (a copy) and say so in ``model.config``; does nothing to a model that ties nothing."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inner: Any = head.innermost if isinstance(head, Adapter) else head
    if inner is not None and len(sharers(model, inner.weight)) > 1:
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=inner.weight.requires_grad)
    return say_untied(model)


def say_untied(model: nn.Module) -> nn.Module:
    """Say in ``model.config`` that nothing is tied: saved and loaded, a tied model would have only one of two weights."""
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    return model
