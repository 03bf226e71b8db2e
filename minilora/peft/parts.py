"""The small parts of a layer in PEFT's shape: a module around one parameter, a dictionary of them, a dictionary of numbers.

Each stands for something of an adapter, and writing into it writes there. Next file: ``peft/wrappers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from minilora.lora.adapter import Adapter

__all__ = ["Entry", "Field", "entries"]


class Parameters(dict):
    """``_parameters`` of an ``Entry``: name to parameter; what is put in is put into the adapter too.

    It is whatever torch's own code puts there: FSDP1 puts plain tensors that are views of its flat parameter.
    """

    def __init__(self, adapter: Adapter, attributes: Mapping[str, str]) -> None:
        super().__init__({name: adapter._parameters[attribute] for name, attribute in attributes.items()})
        self.adapter, self.attributes = adapter, dict(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        self.adapter._parameters[self.attributes[name]] = value
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple:
        return Parameters, (self.adapter, self.attributes)


class Entry(nn.Module):
    """``lora_A["default"]``: a module with a ``weight``, and a ``bias`` where the adapter trains one."""

    weight: Tensor

    def __init__(self, adapter: Adapter, attributes: Mapping[str, str]) -> None:
        super().__init__()
        own = {name: attribute for name, attribute in attributes.items() if attribute in adapter._parameters}
        self.__dict__["_parameters"] = Parameters(adapter, own)
        for name, attribute in attributes.items():
            if name not in own:  # made from another layer's: a tied head's
                self.__dict__[name] = getattr(adapter, attribute)

    @property
    def bias(self) -> Tensor | None:
        """Of ``lora_B`` where ``lora_bias`` is set, else None."""
        return self._parameters.get("bias")

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` through this matrix alone."""
        return nn.functional.linear(x, self.weight, self.bias)


class Values(nn.ParameterDict):
    """``lora_embedding_A``: adapter name to a parameter."""

    def __init__(self, adapters: Mapping[str, Adapter], attribute: str) -> None:
        super().__init__()
        for name, adapter in adapters.items():
            self._keys[name] = None
            value = getattr(adapter, attribute)
            if attribute in adapter._parameters:
                self._parameters[name] = value
            else:
                self.__dict__[name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(f"the parameter of {key!r} can be written into (.data, copy_), not replaced")


class Field(dict):
    """Adapter name to one of the adapters' numbers; what is set is set on the adapter."""

    def __init__(self, adapters: Mapping[str, Any], attribute: str) -> None:
        super().__init__({name: getattr(adapter, attribute) for name, adapter in adapters.items()})
        self._adapters, self._attribute = dict(adapters), attribute

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._adapters[name], self._attribute, value)
        super().__setitem__(name, value)


def entries(layer: nn.Module, kept: Mapping[str, Adapter]) -> None:
    """Give a layer the dictionaries that its adapters' ``file_names`` speak of: "lora_A.weight" is an ``Entry`` under ``lora_A``."""
    dropout = {
        name: drop for name, adapter in kept.items() if (drop := adapter._modules.get("lora_dropout")) is not None
    }
    if dropout:
        layer._modules["lora_dropout"] = nn.ModuleDict(dropout)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, adapter in kept.items():
        for attribute, file in adapter.file_names.items():
            if getattr(adapter, attribute, None) is not None:
                group, _, part = file.partition(".")
                found.setdefault(group, {}).setdefault(name, {})[part] = attribute
    for group, by_name in found.items():
        if all("" in parts for parts in by_name.values()) and not group.startswith("lora_magnitude"):
            (attribute,) = {parts[""] for parts in by_name.values()}
            layer._modules[group] = Values({name: kept[name] for name in by_name}, attribute)
        else:
            held = {
                name: Entry(kept[name], {part or "weight": at for part, at in parts.items()})
                for name, parts in by_name.items()
            }
            layer._modules[group] = nn.ModuleDict(held)
