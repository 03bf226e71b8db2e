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
    held = (module._parameters[name] for value in adapters.named(adapter_name).values() if isinstance(value, nn.Module)
            for module, name in _trained(value))  # fmt: skip
    if not any(parameter is not None and parameter.is_meta for parameter in held):
        return
    with LOCK, Change() as change:
        for slot in adapters.slots.values():
            value = slot.kept.get(adapter_name)
            if not isinstance(value, nn.Module):
                continue
            for module, name in _trained(value):
                old: Any = module._parameters[name]
                if old.is_meta:
                    base: Any = slot.base
                    device = next(iter([*base.parameters(), *base.buffers()])).device
                    new = nn.Parameter(torch.zeros_like(old, device=device), old.requires_grad)
                    change.item(module._parameters, name, new)
        adapters.refresh(change, adapter_name)  # the parts of faces hold the old ones


def _trained(value: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each own parameter as the module that holds it and its name there."""
    if isinstance(value, Adapter):
        return [(value, name) for name, parameter in value._parameters.items() if parameter is not None]
    return [(module, name) for module in value.modules() for name, p in module._parameters.items() if p is not None]
