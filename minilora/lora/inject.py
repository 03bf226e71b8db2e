"""The walker: find what a config means, refuse on any doubt, and only then replace.

All matches are listed and everything new is built first, so a mistake leaves the model exactly as it was.
Next file: ``quant/codebooks.py``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from minilora.errors import ConfigError, StateError, TargetError, nearest
from minilora.linear.layers import in_front, is_linear, is_quantized
from minilora.lora.adapter import Adapter, variant
from minilora.lora.architectures import DEFAULT_TARGETS
from minilora.lora.config import LoraConfig, pattern_matches
from minilora.lora.slots import Adapters, Slot, Value, adapters_of, attach, detach, has_adapters, own_parameters
from minilora.lora.targets import Selection, ends_with, layer_index, select
from minilora.lora.tying import adapt_embedding, train_rows

ALL_LINEAR = "all-linear"
# A new task head is trained whole: PEFT's rule by task type.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Match:
    """What a config means on one model: dotted paths, in the model's order."""

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    tokens: dict[str, Sequence[int]]


def match(model: nn.Module, config: LoraConfig) -> Match:
    """List what ``config`` selects on the bare ``model``, without touching it.

    Raises:
        TargetError: an entry matches nothing (with the closest names), a match is no linear layer, is shared between two places,
            or nothing is left to adapt.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    saved = _saved(modules, config)
    targets = _wanted(model, modules, config)
    if config.exclude_modules is not None:
        excluded = set(select(modules, config.exclude_modules, "exclude_modules"))
        targets = [path for path in targets if path not in excluded]
    targets = [path for path in targets if not any(path == place or path.startswith(place + ".") for place in saved)]
    targets = _in_layers(targets, config)
    if not targets:
        raise TargetError("nothing is left to adapt after exclude_modules and modules_to_save; loosen one of them")
    refuse_unfit(model, modules, targets)
    _refuse_idle_patterns(config, targets)
    return Match(
        tuple(targets), tuple(saved), tuple(_biases(model, config, targets, saved)), _tokens(model, modules, config)
    )


def _wanted(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        heads = _HEADS.get(config.task_type or "", ())
        return [path for path in linear_paths(model) if not any(ends_with(path, head) for head in heads)]
    if wanted is not None:
        return select(modules, wanted, "target_modules")
    default = default_targets(model)
    if isinstance(default, str):
        return select(modules, default, "target_modules")
    present = [entry for entry in default if any(ends_with(path, entry) for path in modules)]
    return select(modules, present or default, "target_modules")


def default_targets(model: nn.Module) -> Selection:
    """What ``target_modules=None`` means for this architecture. Raises ``TargetError`` for one that the table lacks."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise TargetError(
            f"target_modules=None has no default for model_type={kind!r}; name the layers, or use 'all-linear'"
        )
    return DEFAULT_TARGETS[kind]


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of every linear layer but the output head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [path for path, module in model.named_modules() if path and is_linear(module) and module is not output]


def _saved(modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    names = tuple(config.modules_to_save or ())
    heads = [head for head in _HEADS.get(config.task_type or "", ()) if any(ends_with(path, head) for path in modules)]
    if not names and not heads:
        return []
    saved = select(modules, (*names, *heads), "modules_to_save")
    for path in saved:
        if outer := [place for place in saved if path.startswith(place + ".")]:
            raise TargetError(
                f"modules_to_save: {path} lies in {outer[0]}, which is copied whole; name only one of them"
            )
        if packed := [name for name, module in modules[path].named_modules() if is_quantized(module)]:
            raise TargetError(
                f"modules_to_save: {path} is quantized{' in ' + packed[0] if packed[0] else ''} and cannot be trained whole; "
                "name another, or give the dense model"
            )
    return saved


def refuse_unfit(model: nn.Module, modules: dict[str, nn.Module], targets: Iterable[str]) -> None:
    wanted = set(targets)
    for path in targets:
        module = modules[path]
        if isinstance(module, Adapter):
            raise StateError(
                f"{path} carries an adapter already; add another with add_adapter, or merge_and_unload() first"
            )
        if not (is_linear(module) or isinstance(module, nn.Embedding)):
            inside = [f"{path}.{name}" for name, child in module.named_modules() if name and is_linear(child)]
            hint = (
                f"; name its linear layers, such as {inside[0]!r}" if inside else "; wanted Linear, Conv1D or Embedding"
            )
            raise TargetError(f"{path} is a {type(module).__name__}, which takes no adapter{hint}")
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        first = places.setdefault(id(module), path)
        if first != path and first in wanted:
            raise TargetError(
                f"{first} and {path} are one shared layer; give each its own copy, or exclude it with exclude_modules"
            )


def _refuse_idle_patterns(config: LoraConfig, targets: list[str]) -> None:
    """A pattern that no adapted layer matches is a typo, and its rank or alpha would silently not apply."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(pattern_matches(key, path) for path in targets):
                known = {path.rsplit(".", 1)[-1] for path in targets}
                raise TargetError(
                    f"{field} key {key!r} matches no adapted layer; their names are {nearest(key, known)}"
                )


def _in_layers(targets: list[str], config: LoraConfig) -> list[str]:
    """The targets in the layers that ``layers_to_transform`` names; one given by its full path stays (PEFT's rule)."""
    wanted = config.layers_to_transform
    if wanted is None:
        return targets
    named = set() if isinstance(config.target_modules, str) else set(config.target_modules or ())
    index_of = {path: layer_index(path, config.layers_pattern) for path in targets}
    known = sorted({index for index in index_of.values() if index is not None})
    chosen = {wanted} if isinstance(wanted, int) else set(wanted)
    if missing := sorted(chosen - set(known)):
        where = f"layers {known[0]} to {known[-1]}" if known else "no numbered layer"
        raise TargetError(f"layers_to_transform: {missing[0]} is not there; target_modules are found in {where}")
    return [path for path, index in index_of.items() if index in chosen or path in named]


def _tokens(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> dict[str, Sequence[int]]:
    """Embedding path to the rows that train."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if isinstance(wanted, Mapping):
        by_path = {
            path: ids for name, ids in wanted.items() for path in select(modules, [name], "trainable_token_indices")
        }
    else:
        table = getattr(model, "get_input_embeddings", lambda: None)()
        by_path = {path: wanted for path, module in modules.items() if module is table}
        if not by_path:
            raise TargetError(
                "trainable_token_indices as a list wants a model with get_input_embeddings(); give {'name': [...]} instead"
            )
    for path in by_path:
        if not isinstance(modules[path], nn.Embedding):
            raise TargetError(
                f"trainable_token_indices: {path} is a {type(modules[path]).__name__}; wanted an Embedding"
            )
    return by_path


def _biases(model: nn.Module, config: LoraConfig, targets: list[str], saved: list[str]) -> list[str]:
    """Paths of the bias parameters that train (those of a copied module train in the copy)."""
    if config.bias not in ("all", "lora_only"):
        return []
    every = [
        path
        for path, parameter in model.named_parameters()
        if path.rsplit(".", 1)[-1] == "bias" and parameter.is_floating_point()
    ]
    every = [path for path in every if not any(path.startswith(place + ".") for place in saved)]
    if config.bias == "all":
        return every
    return [path for path in every if path.rpartition(".")[0] in targets] if config.bias == "lora_only" else []


def build(
    model: nn.Module, config: LoraConfig, adapter_name: str = "default", kind: str | None = None
) -> dict[str, Value]:
    """What a new adapter puts into each slot, by path: adapters, copies of modules, copies of biases. The model is not touched.

    Args:
        kind: name of a registered variant; None for the one that the config means.

    Raises:
        TargetError: as ``match``, or an embedding that cannot take the variant. StateError: the name is taken.
    """
    adapters = adapters_of(model) if has_adapters(model) else Adapters()
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"the config is a {type(config).__name__}; wanted a LoraConfig of minilora")
    check_adapter_name(adapter_name)
    if adapter_name in adapters.configs:
        raise StateError(
            f"an adapter is called {adapter_name!r} already; choose another name, or delete_adapter({adapter_name!r}) first"
        )
    make = variant(kind or config.variant)
    with adapters.bare():
        found = match(model, config)
        values: dict[str, Value] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for path in found.targets:
            layer = modules[path]
            if isinstance(layer, nn.Embedding):
                values |= adapt_embedding(model, path, layer, config, kind or config.variant)
            elif make.replaces_base and path in adapters.slots and not is_quantized(layer):
                raise TargetError(
                    f"{path}: {make.__name__} replaces the base layer, which other adapters stand on; inject it first"
                )
            else:
                values[path] = make(layer, config, path)
        for path, indices in found.tokens.items():
            if path in values:
                raise TargetError(f"{path} is in target_modules and in trainable_token_indices; choose one of them")
            values |= train_rows(model, path, indices)
        for path in found.saved:
            values[path] = copy.deepcopy(model.get_submodule(path)).requires_grad_(True)
        for path in found.biases:
            values[path] = nn.Parameter(model.get_parameter(path).detach().clone())
    for value in values.values():
        if isinstance(value, nn.Module) and value.training != model.training:
            value.train(model.training)
        if isinstance(value, Adapter):
            for name in value.fixed:
                value.get_parameter(name).requires_grad_(False)
    return values


def check_adapter_name(name: str) -> None:
    """Raise ``StateError`` for a name that could leave its folder: letters, digits, ``_`` and ``-`` are allowed, 64 at most."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise StateError(
            f"adapter name {name!r}: wanted 1 to 64 letters, digits, '_' or '-', because it becomes a folder's name"
        )


def place(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    values: Mapping[str, Value],
    kind: str | None = None,
    activate: bool = True,
) -> None:
    """Put what ``build`` made into the model, active or kept aside; the first adapter freezes the model.

    Whatever stops it half way, an interrupt included, leaves the model as it was.
    """
    adapters = adapters_of(model) if has_adapters(model) else Adapters()
    kept = [value for slot in adapters.slots.values() for value in slot.kept.values()]
    parameters = [*model.parameters(), *(parameter for value in kept for parameter in own_parameters(value))]
    trained = [parameter.requires_grad for parameter in parameters]
    with adapters.bare():
        modules = dict(model.named_modules(remove_duplicate=False))
        slots = {path: adapters.slots.get(path) or slot_at(modules, path) for path in values}
    bases, active = {path: slot.base for path, slot in slots.items()}, adapters.active
    try:
        if not has_adapters(model):
            model.requires_grad_(False)
            attach(model, adapters)
        _fill_slots(adapters, slots, adapter_name, values, activate)
        adapters.configs[adapter_name], adapters.variants[adapter_name] = config, kind or config.variant
        in_front(model)
        if activate:
            adapters.activate([adapter_name])
        else:
            adapters.show()
    except BaseException:
        for path, base in bases.items():
            slots[path].base = base
        adapters.forget(adapter_name)
        adapters.active = active
        adapters.show()
        if not adapters.configs:
            detach(model)
        for parameter, was in zip(parameters, trained, strict=True):
            parameter.requires_grad_(was)
        raise


def _fill_slots(
    adapters: Adapters, slots: Mapping[str, Slot], adapter_name: str, values: Mapping[str, Value], activate: bool
) -> None:
    for path, value in values.items():
        slot = adapters.slots[path] = slots[path]
        slot.kept[adapter_name] = value
        if isinstance(value, Adapter) and value.replaces_base:
            slot.base = value.base_layer
        for parameter in own_parameters(value):
            parameter.requires_grad_(activate)


def inject(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    variant: str | None = None,
    activate: bool = True,
) -> nn.Module:
    """Put a new adapter into every layer that ``config`` selects, freeze the rest, and make it the active one.

    Args:
        model: any module; changed in place and returned.
        config: what to adapt; never changed.
        adapter_name: what switching and saving call it.
        variant: name of a registered variant, such as "vera"; None for the one that the config means.
        activate: False keeps it aside, and what is active stays so.

    Raises:
        TargetError, StateError: as ``build``, and for a variant that packs the base layer itself where it is packed already.
            Nothing has changed then.
    """
    values = build(model, config, adapter_name, variant)
    for path, value in values.items():
        if isinstance(value, Adapter) and value.replaces_base and not value.base_replaced:
            what = f"{path}: is packed already, and {type(value).__name__} packs its base layer itself, to make up for the error"
            raise TargetError(f"{what}; give it the dense model (a saved adapter may be loaded onto a packed one)")
    place(model, config, adapter_name, values, variant, activate)
    return model


def slot_at(modules: Mapping[str, nn.Module], path: str) -> Slot:
    parent_path, _, attr = path.rpartition(".")
    parent = modules[parent_path]
    return Slot(path, parent, attr, getattr(parent, attr))
