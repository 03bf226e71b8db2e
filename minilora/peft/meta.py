"""Adapters without values (``low_cpu_mem_usage=True``): shapes on the meta device, until a state dict is loaded into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minilora.lora.adapter import Adapter
from minilora.lora.change import Change
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


def made_real(change: Change, model: nn.Module, adapter_name: str) -> None:
    """Give an adapter that has none memory for its values, on the devices of their layers."""
    adapters = adapters_of(model)
    empty: list[
        tuple[Any, Any, str]
    ] = []  # what is frozen there, and a dictionary with a key whose parameter has no values
    for slot in adapters.slots.values():
        value: Any = slot.kept.get(adapter_name)
        if isinstance(value, nn.Parameter):
            held: Any = [(slot.kept, adapter_name)]
        else:
            held = [(module._parameters, name) for module, name in _trained(value)] if value is not None else []
        empty += [(slot.base, place, name) for place, name in held if place[name].is_meta]
    for base, place, name in empty:
        frozen = [base] if isinstance(base, nn.Parameter) else [*base.parameters(), *base.buffers()]
        real = torch.zeros_like(place[name], device=frozen[0].device)
        change.item(place, name, nn.Parameter(real, place[name].requires_grad))
    if empty:
        adapters.refresh(change, adapter_name)  # the parts of faces hold the old ones
        adapters.settle(change)


def _trained(value: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each own parameter as the module that holds it and its name there."""
    if isinstance(value, Adapter):
        return [(value, name) for name, parameter in value._parameters.items() if parameter is not None]
    return [(module, name) for module in value.modules() for name, p in module._parameters.items() if p is not None]
