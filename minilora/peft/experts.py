"""A module of experts in PEFT's shape: a ``ParamWrapper`` for each of its adapted weights, one inside the other, the first innermost.

    mlp.experts  =  ParamWrapper(down_proj) . base_layer  =  ParamWrapper(gate_up_proj) . base_layer  =  the module as it was

In minilora the adapters stand in the module, in the places of its weights. Under PEFT's names the module is shown without them; a call of
the outermost wrapper runs the module itself. Next file: ``peft/faces.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minilora.linear.experts.hook import BEFORE
from minilora.linear.experts.known import declared, owner_of
from minilora.linear.experts.layers import ExpertsLinear, is_experts
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters, adapters_of
from minilora.peft.base import face_of
from minilora.peft.layers import ParamWrapper

__all__ = ["experts_paths", "has_wrapper", "shown_path", "wrap"]


def has_wrapper(slot: Slot, adapters: Adapters) -> bool:
    """Whether the face of this slot is around the module that it lies in, and not in its place: of all experts whose module is called."""
    home, _, _ = slot.path.rpartition(".")
    return bool(home) and home not in adapters.slots and is_experts(slot.base) and owner_of(slot.parent) is slot.parent


def shown_path(adapters: Adapters, path: str) -> str:
    """The path at which PEFT's tree has what minilora has at the slot ``path``."""
    slot = adapters.slots[path]
    home, _, name = path.rpartition(".")
    if not has_wrapper(slot, adapters):
        return path
    names = declared(other.attr for other in adapters.slots.values() if other.parent is slot.parent and other.kept)
    return home + ".base_layer" * (len(names) - 1 - names.index(name))


def wrap(change: Change, model: nn.Module, adapters: Adapters) -> None:
    """Put wrappers around every module of experts that has adapters, in line with what its slots keep; take them away from the others."""
    homes: dict[str, dict[str, Slot]] = {}
    for slot in adapters.slots.values():
        if has_wrapper(slot, adapters):
            homes.setdefault(slot.path.rpartition(".")[0], {})[slot.attr] = slot
    doors = dict(adapters.doors)
    for home, slots in homes.items():
        experts = next(iter(slots.values())).parent
        owner, _, attr = home.rpartition(".")
        parent = doors[home][0] if home in doors else Bare(model).get_submodule(owner)
        held = {name: slots[name] for name in declared(slots) if slots[name].kept}
        change.item(parent._modules, attr, _nested(change, experts, held, adapters, parent._modules[attr]))
        if held:
            doors[home] = (parent, attr, experts)
        else:
            doors.pop(home, None)
    change.put(adapters, "doors", doors)


def _nested(change: Change, experts: nn.Module, slots: dict[str, Slot], adapters: Adapters, old: Any) -> nn.Module:
    """The outermost wrapper, each the object that it was; the module itself where nothing is adapted."""
    if not slots:
        return experts
    known: dict[str, Any] = {}
    while isinstance(old, ParamWrapper):
        known[old.parameter_name] = old
        old = old._modules["base_layer"]
    shown: Any = _bare(experts, slots)
    for name, slot in slots.items():
        new = face_of(ParamWrapper, slot, adapters)
        new._modules["base_layer"] = shown
        new.__dict__["stands"] = experts
        for adapter_name, value in slot.kept.items():
            new.enter(change, adapter_name, value)
        if name in known:  # who holds the wrapper sees what is new in it
            for part in ("_modules", "kept"):
                change.item(vars(known[name]), part, vars(new)[part])
            new = known[name]
        shown = new
    return shown


def _bare(experts: nn.Module, slots: dict[str, Slot]) -> nn.Module:
    """An object of the module's class that holds what it would hold without adapters: the very parameters."""
    other = object.__new__(type(experts))
    other.__dict__.update(experts.__dict__)
    layers: dict[str, Any] = {name: slot.under for name, slot in slots.items()}
    dense = {name: layer for name, layer in layers.items() if type(layer) is ExpertsLinear}
    own = {name: parameter for name, parameter in experts._parameters.items() if name not in layers}
    held = {**{name: layer._parameters["weight"] for name, layer in dense.items()}, **own}
    order = [name for name in vars(experts).get(BEFORE, held) if name in held]
    parameters = _Written({name: held[name] for name in dict.fromkeys((*order, *held))})
    parameters.experts, parameters.dense = experts, dense
    other.__dict__["_parameters"] = parameters
    packed = {name: layer for name, layer in layers.items() if name not in dense}
    other.__dict__["_modules"] = {n: module for n, module in experts._modules.items() if n not in layers} | packed
    return other


class _Written(dict):
    """``_parameters`` of a module that is shown without its adapters; what is put in is put where it is used."""

    experts: Any = None
    dense: Any = None

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if self.experts is not None:
            held, key = (self.dense[name], "weight") if name in self.dense else (self.experts, name)
            held._parameters[key] = value
            if name in self.experts._parameters:
                self.experts._parameters[name] = value


def experts_paths(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Of an adapter's experts: where its file has each -> where PEFT's tree has it now, inside of those of other adapters."""
    adapters = adapters_of(model)
    held = {path: value for path, value in adapters.named(adapter_name).items() if isinstance(value, Adapter)}
    return {value.file_path(path): shown_path(adapters, path) for path, value in held.items() if value.on == "experts"}
