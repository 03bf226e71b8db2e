"""Embeddings and the heads tied to them: a change of the table is shared with the head, or refused, never half applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minilora.errors import TargetError
from minilora.linear.layers import is_linear
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.copies import share_parameters, trained, trained_bias
from minilora.lora.slot import Value
from minilora.lora.slots import Adapters
from minilora.lora.variants.embedding import LoRAEmbedding, Tied, TiedEmbedding, TiedHead
from minilora.lora.variants.mica import MiCAEmbedding
from minilora.lora.variants.tokens import HeadRows, TiedRows, TiedTable, TokenRows

__all__ = [
    "adapt_embedding",
    "copy_biases",
    "copy_modules",
    "has_parted",
    "holders",
    "say_untied",
    "sharers",
    "trained_rows",
    "twins_of",
    "untie",
]

# What each variant is on an embedding, where it is anything.
_ON_EMBEDDINGS: dict[str, type[LoRAEmbedding]] = {
    "lora": LoRAEmbedding,
    "mica": MiCAEmbedding,
    "corda": LoRAEmbedding,
    "lora_ga": LoRAEmbedding,
}


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


def adapt_embedding(
    bare: Bare, path: str, layer: nn.Embedding, config: LoraConfig, make: type[Adapter]
) -> dict[str, Value]:
    """An adapter on an embedding, and with ``ensure_weight_tying`` the same update on a head that is tied to it.

    Raises:
        TargetError: the head is tied and the config does not say to share the change, or an update that the head could not share.
    """
    if config.lora_bias:
        raise TargetError(f"{path}: lora_bias=True is not supported for Embedding, which has no bias; leave it out")
    tied = [other for other in sharers(bare, layer.weight) if other != path]
    if tied and not config.ensure_weight_tying:
        raise TargetError(
            f"{path} shares its weight with {tied[0]}; set ensure_weight_tying=True to adapt both alike, or minilora.untie(model) first"
        )
    if tied and make not in (LoRAEmbedding, MiCAEmbedding):
        raise TargetError(
            f"{path} shares its weight with {tied[0]}, which plain LoRA can share only; minilora.untie(model) first"
        )
    adapter = make(layer, config, path)
    return {path: adapter, **_twins(bare, tied, adapter, TiedEmbedding, TiedHead)}


def _twins(bare: Bare, paths: Sequence[str], source: Adapter, table: type[Tied], head: type[Tied]) -> dict[str, Value]:
    """What goes around the other modules that hold the same weight: ``table`` around embeddings, ``head`` around linear layers."""
    layers = {path: bare.get_submodule(path) for path in paths}
    return {path: (table if isinstance(layer, nn.Embedding) else head)(layer, source) for path, layer in layers.items()}


def copy_modules(
    bare: Bare, paths: Sequence[str], config: LoraConfig, made: Mapping[str, Value] | None = None
) -> dict[str, Value]:
    """Copies of the modules that train whole, and with ``ensure_weight_tying`` of the modules tied to them, which share the copy's numbers.

    Args:
        made: what there is of the adapter already.

    Raises:
        TargetError: something of the adapter stands on a module that goes with a copy, one object stands in several places, or shares its
            weight with another table (T5's ``shared``, which the model may never call) and the config does not say to share the change.
    """
    if not paths:
        return {}
    places: dict[int, list[str]] = {}
    for path, part in bare.named_modules(remove_duplicate=False):
        places.setdefault(id(part), []).append(path)
    held_by = holders(bare)
    values: dict[str, Value] = {}
    for path in paths:
        if path in values:
            continue
        module = bare.get_submodule(path)
        if again := [other for other in places[id(module)] if other != path]:
            raise TargetError(f"modules_to_save: {path} and {again[0]} are one shared module; give each its own copy")
        twins = twins_of(bare, module, held_by)
        if config.ensure_weight_tying:
            if taken := [other for other in twins if other in (made or {})]:
                raise TargetError(
                    f"modules_to_save: {path} trains whole, {taken[0]} with it because they are tied, and {taken[0]} has its own place in "
                    "target_modules or trainable_token_indices; drop one of the two, or minilora.untie(model) first"
                )
            values[path] = new = trained(bare.deepcopy(path))
            values |= dict(zip(twins, share_parameters(new, module, map(bare.get_submodule, twins)), strict=True))
            continue
        tables = [
            other for other in twins if isinstance(bare.get_submodule(other), nn.Embedding) and other not in paths
        ]
        if tables and isinstance(module, nn.Embedding):
            raise TargetError(
                f"modules_to_save: {path} shares its weight with {tables[0]}, which would not change; set "
                "ensure_weight_tying=True, to train them as one, or minilora.untie(model) first"
            )
        values[path] = trained(bare.deepcopy(path))
    return values


def twins_of(bare: Bare, module: nn.Module, held_by: Mapping[int, Sequence[str]] | None = None) -> list[str]:
    """Paths of the modules outside of this one that hold a parameter of it."""
    inside = {id(part): part for _, part in bare.parts_of(module)}
    held_by = holders(bare) if held_by is None else held_by
    shared = [held_by[id(parameter)] for part in inside.values() for _, parameter in bare.parameters_of(part)]
    others = dict.fromkeys(path for paths in shared if len(paths) > 1 for path in paths)
    return [path for path in others if id(bare.get_submodule(path)) not in inside]


def copy_biases(bare: Bare, paths: Sequence[str]) -> dict[str, Value]:
    """Copies of the biases that train; a bias that several modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for path in paths:
        bias = bare.get_parameter(path)
        if id(bias) not in made:
            made[id(bias)] = trained_bias(bias)
    return {path: made[id(bare.get_parameter(path))] for path in paths}


def trained_rows(
    bare: Bare, path: str, indices: Sequence[int], made: Mapping[str, Value], config: LoraConfig
) -> dict[str, Value]:
    """Trained rows of an embedding, shared with all that is tied to it (as PEFT shares them); or those of an output head.

    Args:
        made: what there is of the adapter already. A head that came along with its table keeps that one's rows if they are the same.

    Raises:
        TargetError: ``ensure_weight_tying``, and a tied layer is to train other rows than its table.
    """
    layer = bare.get_submodule(path)
    if isinstance(known := made.get(path), Tied):
        if list(indices) == known.source.token_indices.tolist():
            return {}
        if config.ensure_weight_tying:
            raise TargetError(
                "trainable_token_indices: Cannot ensure weight tying when different token indices are specified, and "
                f"{path} is tied to a table of which other rows train; name the same rows, or set ensure_weight_tying=False"
            )
    if not isinstance(layer, nn.Embedding):
        return {path: HeadRows(layer, indices, path)}
    adapter = TokenRows(layer, indices, path)
    tied = [other for other in sharers(bare, layer.weight) if other != path]
    return {path: adapter, **_twins(bare, tied, adapter, TiedTable, TiedRows)}


def has_parted(bare: Bare, adapters: Adapters, names: Sequence[str]) -> bool:
    """Whether one of these adapters trains a copy whose weight another module shared, and which is not the same one any more."""
    copies = {
        path: value
        for path, slot in adapters.slots.items()
        for name in names
        if isinstance(value := slot.kept.get(name), nn.Module) and not isinstance(value, Adapter)
    }
    held_by = holders(bare) if copies else {}
    for path, value in copies.items():
        base: nn.Module = adapters.slots[path].base  # type: ignore[assignment]
        inside = set(map(id, base.modules()))
        for old, new in zip(base.parameters(), value.parameters(), strict=True):
            others = [other for other in held_by.get(id(old), ()) if id(bare.get_submodule(other)) not in inside]
            twins = [copies.get(other, nn.Identity()) for other in others]
            if not all(any(parameter is new for parameter in twin.parameters()) for twin in twins):
                return True
    return False


def say_untied(change: Change, model: nn.Module) -> None:
    """Say in ``model.config`` and the configs in it that nothing is tied: saved and loaded, it would have only one of two weights."""
    config: Any = getattr(model, "config", None)
    for part in (config, *vars(config).values()) if config is not None else ():
        if hasattr(part, "tie_word_embeddings"):
            change.put(part, "tie_word_embeddings", False)


def untie(model: nn.Module) -> nn.Module:
    """Give every head that shares its weight with an embedding a weight of its own (a copy), and say so in ``model.config``.

    The heads are the output head and those of models inside (BLIP's text decoder). Does nothing to a model that ties nothing.
    """
    bare = Bare(model)
    modules = dict(bare.named_modules())
    tables = {id(module._parameters["weight"]) for module in modules.values() if isinstance(module, nn.Embedding)}
    linear = [module for module in modules.values() if is_linear(module)]
    heads: list[Any] = [module for module in linear if id(module._parameters.get("weight")) in tables]
    output: Any = bare.get_output_embeddings()
    if output is not None and len(sharers(bare, output.weight)) > 1 and all(head is not output for head in heads):
        heads.append(output)
    with LOCK, Change() as change:
        for head in heads:
            weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            change.item(head._parameters, "weight", weight)
        say_untied(change, model)
    return model
