"""The model without its adapters, to be read: whatever sits in the slots now, and without touching them.

Saving, loading beside, counting and matching look at the base model. They read it here, from the record of the slots, so that a forward
that another thread runs meanwhile meets the same layers from its first to its last. Next file: ``lora/match.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from minilora.linear.experts.hook import put_projection
from minilora.linear.experts.known import note_home, projections
from minilora.linear.experts.layers import ExpertsLinear
from minilora.lora.change import LOCK, Change
from minilora.lora.slot import Slot
from minilora.lora.slots import adapters_of, has_adapters, unwrapped

__all__ = ["Around", "Bare"]

Around = Callable[[str], AbstractContextManager[Any]]  # in which the weights at a path are at hand


class Bare:
    """Reads like an ``nn.Module``: the same paths and order as the model has with every base value in its slot.

    It holds what the record said when it was made. Nothing of the model can be changed through it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots: dict[str, Slot] = dict(adapters_of(model).slots) if has_adapters(model) else {}
        self.model = unwrapped(model)
        self._bases: dict[tuple[int, str], Any] = {
            (id(_home(self._slots, path)), slot.attr): slot.base for path, slot in self._slots.items()
        }
        doors = list(adapters_of(model).doors.values()) if has_adapters(model) else []
        self._bases |= {(id(parent), attr): module for parent, attr, module in doors}

    @property
    def config(self) -> Any:
        """The model's own ``config``, or None."""
        return getattr(self.model, "config", None)

    def named_modules(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        """Path and module, as ``nn.Module.named_modules``."""
        return self._walk(self.model, "", set() if remove_duplicate else None)

    def parts_of(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """A module of the bare model and all in it, with their paths from there."""
        return self._walk(module, "", set())

    def _walk(self, module: nn.Module, path: str, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
        if seen is not None:
            if id(module) in seen:
                return
            seen.add(id(module))
        yield path, module
        note_home(module)
        for name in dict.fromkeys((*projections(module), *module._modules)):
            child = self._child(module, name)
            if child is not None:
                yield from self._walk(child, f"{path}.{name}" if path else name, seen)

    def _child(self, module: nn.Module, name: str) -> nn.Module | None:
        note_home(module)
        base = self._bases.get((id(module), name))
        if isinstance(base, nn.Module):
            return base
        return module._modules[name] if name in module._modules else projections(module).get(name)

    def modules(self) -> Iterator[nn.Module]:
        """Every module once."""
        return (module for _, module in self.named_modules())

    def parameters_of(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of one module, without its children's; a projection of experts is a child, whether it is adapted or not."""
        layers = projections(module)
        for name, parameter in list(module._parameters.items()):
            if name in layers:
                continue
            base = self._bases.get((id(module), name), parameter)
            if isinstance(base, nn.Parameter):
                yield name, base

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Path and parameter, each parameter once, as ``nn.Module.named_parameters``."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, parameter in self.parameters_of(module):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}" if path else name, parameter

    def get_submodule(self, path: str) -> nn.Module:
        """The module at ``path``. Raises ``AttributeError`` where there is none."""
        module = self.model
        for name in path.split(".") if path else ():
            child = self._child(module, name)
            if child is None:
                raise AttributeError(f"{type(self.model).__name__} has no {path!r}")
            module = child
        return module

    def get_parameter(self, path: str) -> nn.Parameter:
        """The parameter at ``path``. Raises ``AttributeError`` where there is none."""
        owner, _, name = path.rpartition(".")
        found = dict(self.parameters_of(self.get_submodule(owner))).get(name)
        if found is None:
            raise AttributeError(f"{type(self.model).__name__} has no parameter {path!r}")
        return found

    def get_input_embeddings(self) -> nn.Module | None:
        """The model's own answer, or None where it gives none; the base module, not what stands around it."""
        return self._base_of("get_input_embeddings")

    def get_output_embeddings(self) -> nn.Module | None:
        """As ``get_input_embeddings``."""
        return self._base_of("get_output_embeddings")

    def _base_of(self, question: str) -> nn.Module | None:
        """What is under the module that the model names."""
        with LOCK, Change():  # nobody puts another layer into the slots between the two questions
            shown = _answer(self.model, question)
            for slot in self._slots.values():
                if shown is not None and shown is slot.parent._modules.get(slot.attr):
                    return slot.base if isinstance(slot.base, nn.Module) else shown
        return shown

    def deepcopy(self, path: str) -> nn.Module:
        """A copy of the bare module at ``path``: where an adapter stands in it, the copy has the base value."""
        with LOCK, Change():  # nor while it is copied
            memo: dict[int, Any] = {}
            inside = [within for within in self._slots if within.startswith(path + ".")]
            for place in sorted(
                inside, key=lambda place: isinstance(self._slots[place].base, nn.Module)
            ):  # biases first
                slot, home = self._slots[place], _home(self._slots, place)
                shown = (home._modules if isinstance(slot.base, nn.Module) else home._parameters).get(slot.attr)
                if shown is not None and shown is not slot.base:
                    memo[id(shown)] = copy.deepcopy(slot.base, memo)
            whole = copy.deepcopy(self.get_submodule(path), memo)
            with Change() as change:
                for within in inside:
                    if isinstance(self._slots[within].base, ExpertsLinear):
                        owner, _, name = within.removeprefix(path + ".").rpartition(".")
                        home = whole.get_submodule(owner)
                        put_projection(change, home, name, home._modules[name])  # type: ignore[arg-type]
            return whole


def _home(slots: dict[str, Slot], path: str) -> nn.Module:
    """The module of the bare model in which a slot lies: of a bias, the layer that stands there now."""
    slot, owner = slots[path], slots.get(path.rpartition(".")[0])
    return owner.base if owner is not None and isinstance(owner.base, nn.Module) else slot.parent


def _answer(model: nn.Module, question: str) -> nn.Module | None:
    """What the model says; transformers' models without such a layer (sound, pictures) raise ``NotImplementedError``."""
    try:
        return getattr(model, question, lambda: None)()
    except NotImplementedError:
        return None
