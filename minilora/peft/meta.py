"""Adapters without values (``low_cpu_mem_usage=True``): shapes on the meta device, until a state dict is loaded into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.slot import Value
from minilora.lora.slots import adapters_of

__all__ = ["emptied", "made_real"]


def emptied(values: dict[str, Value]) -> None:
    """Take the values out of a new adapter that is in no model yet. It cannot be used before some have been loaded."""
    for path, value in values.items():
        if isinstance(value, nn.Parameter):
            values[path] = nn.Parameter(value.data.to("meta"), value.requires_grad)
        else:
            for module, name in _trained(value):
                old: Any = module._parameters[name]
                module._parameters[name] = nn.Parameter(old.data.to("meta"), old.requires_grad)


def made_real(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter that has none memory for its values, on the devices of their layers."""
    adapters = adapters_of(model)
    kept = [(slot.base, slot.kept.get(adapter_name)) for slot in adapters.slots.values()]
    empty: list[Any] = [
        (base, module, name)
        for base, value in kept
        if isinstance(value, nn.Module)
        for module, name in _trained(value)
        if getattr(module._parameters[name], "is_meta", False)
    ]
    if not empty:
        return
    with LOCK, Change() as change:
        for base, module, name in empty:
            device = next(iter([*base.parameters(), *base.buffers()])).device
            old = module._parameters[name]
            change.item(module._parameters, name, nn.Parameter(torch.zeros_like(old, device=device), old.requires_grad))
        adapters.refresh(change, adapter_name)  # the parts of faces hold the old ones


def _trained(value: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each own parameter as the module that holds it and its name there."""
    if isinstance(value, Adapter):
        return [(value, name) for name, parameter in value._parameters.items() if parameter is not None]
    return [(module, name) for module in value.modules() for name, p in module._parameters.items() if p is not None]
