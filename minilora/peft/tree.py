"""The model as PEFT's users know it, made when somebody looks: ``base_model.model...q_proj.lora_A.default.weight``.

In minilora an adapter stands in the place of its layer and its matrices are plain parameters; in PEFT a layer holds dictionaries, with an
entry for each adapter, the inactive ones too. This file builds that other shape over the same parameters: a tree of shallow copies of the
modules on the way to an adapter, with a ``LoraLayer`` in each adapter's place. Whatever is written through the tree (a parameter, a
scaling, ``training``) arrives in the model; the model itself knows nothing of it, and its forward pays nothing.
Next file: ``peft/tuners/lora/layer.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minilora.linear.fronts import Front, put_in_front
from minilora.lora.adapter import Adapter
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters, adapters_of, unwrapped
from minilora.peft.tuners.lora.layer import lora_layer
from minilora.peft.wrappers import is_rows, rows_wrapper, saved_wrapper

__all__ = ["plain_class", "tree"]


class Shown(Front):
    """A shallow copy of a module that holds adapters further down: it shares all but the dictionary of its children."""

    def __setattr__(self, name: str, value: Any) -> None:
        """What is set on the copy is set on the module."""
        setattr(self.__dict__["_real"], name, value)
        if isinstance(value, nn.Module) or name in self._modules:
            self._modules[name] = value
        elif name not in self._parameters and name not in self._buffers:
            self.__dict__[name] = value

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``, of the module."""
        self.__dict__["_real"].train(mode)
        return super().train(mode)


def tree(model: nn.Module) -> nn.Module:
    """The bare model of ``model`` with a ``LoraLayer`` (or what PEFT has there) in the place of each slot; made anew at each call."""
    inner = unwrapped(model)
    slots: dict[str, Slot] = dict(adapters_of(model).slots)
    inside = {path[:at] for path in slots for at, sign in enumerate(path) if sign == "."} | {""}
    return _copied(inner, "", slots, inside, adapters_of(model))


def _copied(module: nn.Module, path: str, slots: dict[str, Slot], inside: set[str], adapters: Adapters) -> nn.Module:
    """A copy of the module at ``path`` of the bare model whose children are those of PEFT's tree."""
    copied = object.__new__(plain_class(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = children = dict(module._modules)
    copied.__dict__["_real"] = module
    put_in_front(copied, Shown)
    for name, child in children.items():
        below = f"{path}.{name}" if path else name
        slot = slots.get(below)
        if slot is not None and isinstance(slot.base, nn.Module):
            base = _copied(slot.base, below, slots, inside, adapters) if _holds(below, slots) else slot.base
            children[name] = _around(slot, base, adapters)
        elif child is not None and below in inside:
            children[name] = _copied(child, below, slots, inside, adapters)
    return copied


def _around(slot: Slot, base: nn.Module, adapters: Adapters) -> nn.Module:
    """What PEFT has in the place of a slot: wrappers for copies and rows inside, the LoRA layer outside."""

    def standing() -> Any:
        return slot.parent._modules[slot.attr]

    copies = {
        name: value
        for name, value in slot.kept.items()
        if isinstance(value, nn.Module) and not isinstance(value, Adapter)
    }
    rows = {name: value for name, value in slot.kept.items() if is_rows(value)}
    lora = {name: value for name, value in slot.kept.items() if isinstance(value, Adapter) and name not in rows}
    shown = base
    ways: Any = ((copies, saved_wrapper), (rows, rows_wrapper), (lora, lora_layer))
    for kept, wrap in ways:
        if kept:
            shown = wrap(slot, shown, kept, standing, adapters)
    return shown


def _holds(path: str, slots: dict[str, Slot]) -> bool:
    """Whether modules inside of this one are slots too."""
    return any(other.startswith(f"{path}.") and isinstance(slot.base, nn.Module) for other, slot in slots.items())


def plain_class(module: nn.Module) -> Any:
    """The class of a model without the fronts that minilora put before it."""
    kind: Any = type(module)
    while "_extends" in vars(kind):
        kind = vars(kind)["_extends"][1]
    return kind
