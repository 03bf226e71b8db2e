"""The small parts of a layer in PEFT's shape: a module around one parameter, a dictionary of them, a dictionary of numbers.

Each stands for something of an adapter, and writing into it writes there. Next file: ``peft/wrappers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.lora.change import Change

__all__ = ["Entry", "Field", "Values", "dictionary", "enter", "leave"]


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
    """``lora_A["default"]``: a module with a ``weight``, and a ``bias`` where the adapter trains one, else None."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, adapter: Adapter, attributes: Mapping[str, str]) -> None:
        nn.Module.__init__(self)
        own = {name: attribute for name, attribute in attributes.items() if attribute in adapter._parameters}
        self.__dict__["_parameters"] = Parameters(adapter, own)
        if "bias" not in own:
            self.__dict__["bias"] = None
        for name, attribute in attributes.items():
            if name not in own:  # made from another layer's: a tied head's
                self.__dict__[name] = getattr(adapter, attribute)

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

    def extra_repr(self) -> str:
        """The shape of the weight."""
        return ", ".join(map(str, self.weight.shape))


class LinearEntry(Entry, nn.Linear):  # type: ignore[override, misc]
    """One whose weight is a matrix: to PEFT's users an ``nn.Linear``."""

    def extra_repr(self) -> str:
        """As of ``nn.Linear``."""
        return nn.Linear.extra_repr(self)


class ExpertsEntry(Entry):
    """One whose weight is that of all experts, which a state dict has in PEFT's layout."""

    adapter: Any
    attribute: Any

    def __init__(self, adapter: Adapter, attributes: Mapping[str, str]) -> None:
        super().__init__(adapter, attributes)
        self.__dict__["adapter"], self.__dict__["attribute"] = adapter, attributes["weight"]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[f"{prefix}weight"] = self.adapter.to_file(self.attribute, weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (given := state_dict.get(key := f"{prefix}weight")) is not None:
            state_dict[key] = self.adapter.from_file(self.attribute, given)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Values(nn.ParameterDict):
    """``lora_embedding_A``: adapter name to a parameter."""

    def enter(self, change: Change, name: str, adapter: Adapter, attribute: str) -> None:
        """Show an adapter's parameter under the adapter's name."""
        change.item(self._keys, name, None)
        held = (
            self._parameters if attribute in adapter._parameters else self.__dict__
        )  # a tied one's is no parameter of its own
        change.item(held, name, getattr(adapter, attribute))

    def leave(self, change: Change, name: str) -> None:
        """Show it no longer."""
        for held in (self._keys, self._parameters, self.__dict__):
            change.drop(held, name)

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(f"the parameter of {key!r} can be written into (.data, copy_), not replaced")


class Field(MutableMapping):
    """Adapter name to a number of the adapters, as it is now; what is set is set on the adapter (or cannot be)."""

    def __init__(
        self, kept: Mapping[str, Any], get: Callable[[str], Any], put: Callable[[str, Any], None] | None = None
    ) -> None:
        self._kept, self._get, self._put = kept, get, put

    def __getitem__(self, name: str) -> Any:
        if name not in self._kept:
            raise KeyError(name)
        return self._get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._kept or self._put is None:
            raise StateError(
                f"{name!r}: this number follows from the adapter's config and cannot be set; make another adapter"
            )
        self._put(name, value)

    def __delitem__(self, name: str) -> None:
        raise StateError(f"{name!r} goes when its adapter is deleted: delete_adapter({name!r}) of the model")

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return repr(dict(self))


def _entry(adapter: Adapter, attributes: Mapping[str, str]) -> Entry:
    if adapter.on == "experts" and "weight" in attributes:
        return ExpertsEntry(adapter, attributes)
    kind = LinearEntry if getattr(adapter, attributes.get("weight", ""), torch.empty(0)).dim() == 2 else Entry
    return kind(adapter, attributes)


def enter(change: Change, layer: nn.Module, name: str, adapter: Adapter) -> None:
    """Give a layer's dictionaries an adapter, by its ``file_names``: "lora_A.weight" is an ``Entry`` in the dictionary ``lora_A``."""
    if (drop := adapter._modules.get("lora_dropout")) is not None:
        change.item(dictionary(change, layer, "lora_dropout", nn.ModuleDict)._modules, name, drop)
    found: dict[str, dict[str, str]] = {}
    for attribute, file in adapter.file_names.items():
        if getattr(adapter, attribute, None) is not None:
            group, _, part = file.partition(".")
            found.setdefault(group, {})[part] = attribute
    for group, parts in found.items():
        if "" in parts and not group.startswith("lora_magnitude"):
            dictionary(change, layer, group, Values).enter(change, name, adapter, parts[""])
        else:
            entry = _entry(adapter, {part or "weight": at for part, at in parts.items()})
            change.item(dictionary(change, layer, group, nn.ModuleDict)._modules, name, entry)


def leave(change: Change, layer: nn.Module, name: str) -> None:
    """Take an adapter out of a layer's dictionaries."""
    for held in layer._modules.values():
        if isinstance(held, Values):
            held.leave(change, name)
        elif isinstance(held, nn.ModuleDict):
            change.drop(held._modules, name)


def dictionary(change: Change, layer: nn.Module, group: str, kind: type[nn.Module]) -> Any:
    """A layer's dictionary of this name, made if it is missing."""
    if group not in layer._modules:
        change.item(layer._modules, group, kind())
    return layer._modules[group]
