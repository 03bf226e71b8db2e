"""The walker: build all that a new adapter puts into the model, and only then replace layers by it.

What a config means is listed first (``lora/match.py``) and everything new is built before anything is replaced, so a mistake leaves the
model exactly as it was. Next file: ``quant/codebooks.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext

from torch import nn

from minilora.errors import ConfigError, StateError, TargetError
from minilora.linear.layers import in_front, is_foreign, is_quantized, kind_of
from minilora.lora.adapter import Adapter, variant_at
from minilora.lora.bare import Around, Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.copies import keep_bias_in_fp32
from minilora.lora.match import match
from minilora.lora.named import as_named
from minilora.lora.slot import Slot, Value, own_parameters
from minilora.lora.slots import Adapters, adapters_of, attach, has_adapters, unwrapped
from minilora.lora.tying import adapt_embedding, copy_biases, copy_modules, trained_rows
from minilora.lora.variants.attention import attention_adapters
from minilora.lora.variants.experts import nest
from minilora.lora.variants.vera import share_projections


def build(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    kind: str | None = None,
    around: Around = nullcontext,
) -> dict[str, Value]:
    """What a new adapter puts into each slot, by path: adapters, copies of modules, copies of biases. The model is not touched.

    Args:
        kind: name of a registered variant; None for the one that the config means.
        around: a context for a path, in which the weights of its layer are at hand, where they are in shards.

    Raises:
        TargetError: as ``match``, or an embedding that cannot take the variant. StateError: the name is taken.
    """
    adapters = adapters_of(model) if has_adapters(model) else Adapters()
    check_adapter_name(adapter_name)
    adapters.check_new(adapter_name)
    means = kind or config.variant
    found, bare = match(model, config), Bare(model)
    values: dict[str, Value] = {}
    modules = dict(bare.named_modules(remove_duplicate=False))
    # PEFT draws the start values of layers first, then those of weights that are read, each in the model's order.
    targets = sorted(found.targets, key=lambda path: kind_of(modules[path]) in ("experts", "router"))
    # What a variant cannot stand on is refused first; tables come first then, for they bring their tied heads along.
    makers = {path: variant_at(means, kind_of(modules[path]) or "linear", path, modules[path]) for path in targets}
    for path, make in makers.items():
        if isinstance(table := modules[path], nn.Embedding):
            values |= adapt_embedding(bare, path, table, config, make)
    for path, make in makers.items():
        layer = modules[path]
        if path in values:
            continue
        if isinstance(layer, nn.MultiheadAttention):
            values |= attention_adapters(layer, modules[f"{path}.out_proj"], config, path)
            continue
        if make.replaces_base and is_foreign(layer):
            raise TargetError(
                f"{path}: is a {type(layer).__name__}, packed already, and {make.__name__} packs a dense layer; load the dense model"
            )
        if make.replaces_base and path in adapters.slots and not is_quantized(layer):
            raise TargetError(
                f"{path}: {make.__name__} replaces the base layer, which other adapters stand on; inject it first"
            )
        with around(path):
            values[path] = make(layer, config, path)
    nest(values)
    share_projections(values)
    adapted = set(found.targets)
    for path, indices in found.tokens.items():
        if path in adapted:
            raise TargetError(f"{path} is in target_modules and in trainable_token_indices; choose one of them")
        values |= trained_rows(bare, path, indices, values, config)
    values |= copy_modules(bare, found.saved, config, values) | copy_biases(bare, found.biases)
    for value in values.values():
        if isinstance(value, nn.Module):
            _set_mode(value, model.training)
        if isinstance(value, Adapter):
            for name in value.fixed:
                value.get_parameter(name).requires_grad_(False)
    return values


def _set_mode(value: nn.Module, mode: bool) -> None:
    """Train or eval for what is new, and not for the base layer, which is the model's."""
    if not isinstance(value, Adapter):
        value.train(mode)
        return
    value.training = mode
    for name, part in value.named_children():
        if name != "base_layer":
            part.train(mode)


def check_adapter_name(name: str) -> None:
    """Raise ``StateError`` for a name that could leave its folder: letters, digits, ``_`` and ``-`` are allowed, 64 at most."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise StateError(
            f"adapter name {name!r}: wanted 1 to 64 letters, digits, '_' or '-', because it becomes a folder's name"
        )
    if name == "__base__":
        raise StateError("adapter name '__base__': in a batch it means no adapter; choose another")


def place(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    values: Mapping[str, Value],
    kind: str | None = None,
    activate: bool = True,
    trainable: bool | None = None,
) -> None:
    """Put what ``build`` made into the model, active or kept aside; the first adapter freezes the model.

    Whatever stops it half way, an interrupt included, leaves the model as it was.

    Args:
        trainable: whether its parameters train; default if it is active.

    Raises:
        StateError: the name was taken since, or what is shown now and the new adapter cannot be added.
    """
    with LOCK, Change() as change:
        place_in(change, model, config, adapter_name, values, kind, activate, trainable)


def place_in(
    change: Change,
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    values: Mapping[str, Value],
    kind: str | None = None,
    activate: bool = True,
    trainable: bool | None = None,
) -> None:
    """``place`` as a part of a change."""
    model = unwrapped(model)
    adapters = adapters_of(model) if has_adapters(model) else Adapters()
    adapters.check_new(adapter_name)
    if not has_adapters(model):
        for parameter in model.parameters():
            change.put(parameter, "requires_grad", False)
        attach(change, model, adapters)
    bare = Bare(model)
    modules = dict(bare.named_modules(remove_duplicate=False))
    for value in values.values():
        if isinstance(value, Adapter) and value.brings:
            for name, tensor in value.brings.items():
                change.overwrite(bare.get_parameter(name), tensor)
            change.put(value, "brings", {})
    new = {path: slot_at(modules, path) for path in values if path not in adapters.slots}
    if new:
        change.put(adapters, "slots", adapters.slots | new)
    for path, value in values.items():
        slot = adapters.slots[path]
        change.item(slot.kept, adapter_name, value)
        if isinstance(value, Adapter) and value.replaces_base:
            change.put(slot, "base", value.base_layer)
        if isinstance(value, Adapter) and value.data_name:
            change.drop(vars(value.innermost), value.data_name)
    change.item(adapters.configs, adapter_name, config)
    change.item(adapters.variants, adapter_name, kind or config.variant)
    adapters.refresh(change, adapter_name)
    change.classes(modules.values())
    in_front(modules.values())
    for path in values:
        if isinstance(adapters.slots[path].base, nn.Parameter):
            keep_bias_in_fp32(adapters.slots[path].parent)
    if activate:
        adapters.activate(change, [adapter_name])
    elif new:
        adapters.settle(change)
    for value in values.values():
        for parameter in own_parameters(value):
            parameter.requires_grad_(activate if trainable is None else trainable)


def inject(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    variant: str | None = None,
    activate: bool = True,
    around: Around = nullcontext,
) -> nn.Module:
    """Put a new adapter into every layer that ``config`` selects, freeze the rest, and make it the active one.

    Args:
        model: any module; changed in place and returned.
        config: what to adapt; never changed.
        adapter_name: what switching and saving call it.
        variant: name of a registered variant, such as "vera"; None for the one that the config means.
        activate: False keeps it aside, and what is active stays so. around: as in ``build``.

    Raises:
        TargetError, StateError: as ``build``, and for a variant that cannot start here: one that packs the base layer itself where it is
            packed already, or one that is made from data where there is none. Nothing has changed then.
    """
    config = checked(config, variant)
    values = build_new(model, config, adapter_name, variant, around)
    place(model, config, adapter_name, values, variant, activate)
    return model


def checked(config: LoraConfig, variant: str | None = None) -> LoraConfig:
    """The model's own copy of a user's config, which means the variant that is asked for by name. Raises ``ConfigError``."""
    if not isinstance(config, LoraConfig):
        kind = type(config)
        if kind.__module__.partition(".")[0] == "peft" and kind.__name__ in ("LoraConfig", "VeraConfig"):
            raise ConfigError(
                f"the config is PEFT's {kind.__name__}; wanted minilora's: from minilora.peft import {kind.__name__}, with the same fields"
            )
        raise ConfigError(f"the config is a {kind.__name__}; wanted a LoraConfig of minilora")
    return as_named(config, variant).for_use()


def build_new(
    model: nn.Module, config: LoraConfig, adapter_name: str, variant: str | None, around: Around = nullcontext
) -> dict[str, Value]:
    """``build`` for an adapter that no file fills. Raises as ``inject``."""
    values = build(model, config, adapter_name, variant, around)
    for path, value in values.items():
        if isinstance(value, Adapter) and value.wants_file:
            raise TargetError(f"{path}: {value.wants_file}")
    return values


def slot_at(modules: Mapping[str, nn.Module], path: str) -> Slot:
    parent_path, _, attr = path.rpartition(".")
    parent = modules[parent_path]
    return Slot(path, parent, attr, modules[path] if path in modules else getattr(parent, attr))
