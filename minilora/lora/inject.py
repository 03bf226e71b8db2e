"""The walker: build all that a new adapter puts into the model, and only then replace layers by it.

What a config means is listed first (``lora/match.py``) and everything new is built before anything is replaced, so a mistake leaves the
model exactly as it was. Next file: ``quant/codebooks.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from minilora.errors import ConfigError, StateError, TargetError
from minilora.linear.layers import in_front, is_quantized
from minilora.lora.adapter import Adapter, variant
from minilora.lora.config import LoraConfig
from minilora.lora.copies import keep_bias_in_fp32
from minilora.lora.match import match
from minilora.lora.slots import (
    Adapters,
    Slot,
    Value,
    adapters_of,
    attach,
    detach,
    has_adapters,
    own_parameters,
    unwrapped,
)
from minilora.lora.tying import adapt_embedding, copy_biases, copy_modules, trained_rows


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
    model = unwrapped(model)
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
        tables = [path for path in found.targets if isinstance(modules[path], nn.Embedding)]
        for path in tables:  # first, for they bring their tied heads along
            values |= adapt_embedding(model, path, modules[path], config, kind or config.variant)
        for path in found.targets:
            layer = modules[path]
            if path in values:
                continue
            if make.replaces_base and path in adapters.slots and not is_quantized(layer):
                raise TargetError(
                    f"{path}: {make.__name__} replaces the base layer, which other adapters stand on; inject it first"
                )
            else:
                values[path] = make(layer, config, path)
        for path, indices in found.tokens.items():
            if path in found.targets:
                raise TargetError(f"{path} is in target_modules and in trainable_token_indices; choose one of them")
            values |= trained_rows(model, path, indices, values, config)
        values |= copy_modules(model, found.saved, config) | copy_biases(model, found.biases)
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
    model = unwrapped(model)
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
        for slot in slots.values():
            if isinstance(slot.base, nn.Parameter):
                keep_bias_in_fp32(slot.parent)
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
