"""The slots of one model, and the one record of what sits in each.

Switching puts another object into a slot; nothing is copied, added or asked in ``forward``, and a disabled adapter costs exactly nothing.
Adapters that are not active are kept here, outside the module tree.

Threads. Whatever reads (saving, counting, loading beside) reads the record and leaves the slots alone; an adapter that is added or
deleted aside touches no slot that shows another one. A forward that runs meanwhile is right. What changes the adapters that are shown
(``set_adapter``, merging, ``disable_adapter``, unloading) changes the model for all threads, slot by slot: a forward that runs just then
may meet some layers as they were and some as they are. Threads that want different adapters at the same time name them with
the call (``many/batched.py``; "__base__" there is the bare model). Next file: ``lora/bare.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.errors import StateError, nearest
from minilora.linear.layers import take_back
from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.slot import Slot, Value, check_stack, own_parameters

__all__ = [
    "Adapters",
    "Block",
    "adapters_in",
    "adapters_of",
    "attach",
    "detach",
    "has_adapters",
    "unwrapped",
]

_ATTRIBUTE = "_minilora_adapters"


@dataclass(eq=False)
class Block:
    """A ``with`` block that shows the model in another way: without adapters, or (``mixes``) with an adapter for each row.

    It counts while it is ``open``. One that ``lasts`` is no ``with`` block: ``hide`` opens it and ``unhide`` closes it. Closing is one
    write, so it cannot fail, whichever thread or context does it.
    """

    mixes: bool = False
    open: bool = True
    lasts: bool = False


class Adapters:
    """The named adapters of one model.

    Attributes:
        slots: by path. configs, variants: by adapter name. chosen: names in the slots now, innermost first. merged: names folded
            into the layers. blocks: the ``with`` blocks that run now, on any thread. faces: gives slots their faces after their content
            has changed, where the model has such (``minilora/peft``). doors: path to ``(parent, its attribute, module)`` of the modules in
            whose places such faces stand.
    """

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.variants: dict[str, str] = {}
        self.chosen: tuple[str, ...] = ()
        self.odd: tuple[str, ...] = ()  # paths of slots that show others than the rest (``only``, ``off``)
        self.merged: tuple[str, ...] = ()
        self.blocks: tuple[Block, ...] = ()
        self.doors: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        self.faces: Callable[[Change, Adapters, str | None], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model is in none of the ``with`` blocks that the model is in."""
        return vars(self) | {"blocks": tuple(block for block in self.blocks if block.lasts)}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters. Raises ``StateError`` where some layers were given others than the rest, or switched off."""
        if self.odd:
            shown = self.slots[self.odd[0]]
            what = "none" if shown.off else list(self.chosen if shown.only is None else shown.only)
            raise StateError(
                f"{self.odd[0]} shows adapters {what} and other layers show others; set_adapter or enable_adapters of the model first"
            )
        return self.chosen

    @property
    def mixing(self) -> bool:
        """Whether a batch with an adapter for each row runs, on whatever thread."""
        return any(block.open and block.mixes for block in self.blocks)

    @property
    def is_bare(self) -> bool:
        """Whether a ``bare`` block runs, on whatever thread, or every layer was switched off."""
        return any(block.open and not block.mixes for block in self.blocks) or self._all_off

    def named(self, name: str) -> dict[str, Value]:
        """Path to what adapter ``name`` keeps there. Raises ``StateError`` if there is no such adapter."""
        self.check([name])
        return {path: slot.kept[name] for path, slot in list(self.slots.items()) if name in slot.kept}

    def check(self, names: Iterable[str]) -> None:
        """Raise ``StateError`` for a name that no adapter has."""
        for name in names:
            if not isinstance(name, str) or name not in self.configs:
                raise StateError(f"no adapter is called {name!r}; there are {nearest(str(name), self.configs)}")

    def check_set(self, names: Sequence[str]) -> None:
        """``check``, and raise ``StateError`` for a name that comes twice: it would count double."""
        self.check(names)
        if twice := [name for name in names if list(names).count(name) > 1]:
            raise StateError(f"adapter {twice[0]!r} is named twice; name it once")

    def check_new(self, name: str) -> None:
        """Raise ``StateError`` for a name that an adapter has."""
        if name in self.configs:
            raise StateError(
                f"an adapter is called {name!r} already; choose another name, or delete_adapter({name!r}) first"
            )

    def refuse_while_mixing(self) -> None:
        """Raise ``StateError`` while a batch with an adapter for each row runs, on whatever thread: its layers are in the slots."""
        if self.mixing:
            raise StateError("a batch that mixes adapters is running; change the adapters after it")

    def refuse_merged(self, name: str) -> None:
        """Raise ``StateError`` while adapter ``name`` is merged: new values of it would not reach the weights that it is in."""
        if name in self.merged:
            raise StateError(f"adapter {name!r} is merged, so the model would go on with its old values; unmerge first")

    def forget(self, change: Change, name: str) -> None:
        """Take adapter ``name`` out of the record; slots that are left empty go, with their base put back."""
        for slot in self.slots.values():
            change.drop(slot.kept, name)
        self.refresh(change, name)
        empty = {path for path, slot in self.slots.items() if not slot.kept}
        for path in empty:
            change.put(self.slots[path], "face", None)  # the plain layer stands there again
            self.slots[path].show(change, (), parent=self.home(path))
        if empty:
            change.put(self, "slots", {path: slot for path, slot in self.slots.items() if path not in empty})
        change.drop(self.configs, name)
        change.drop(self.variants, name)

    def refresh(self, change: Change, name: str | None = None) -> None:
        """After what slots keep of an adapter, or (None) what all of it stands on, has changed: bring their faces in line."""
        if self.faces is not None:
            self.faces(change, self, name)

    def activate(self, change: Change, names: Sequence[str]) -> None:
        """Show exactly these adapters (their sum, on top of what is merged), and make them trainable and no other."""
        self.check_set(names)
        self.refuse_while_mixing()
        check_stack(self.slots, names, self.merged)
        for slot in self.slots.values():  # only what comes or goes: the others are frozen since they went
            for name in dict.fromkeys((*(self.chosen if slot.only is None else slot.only), *names)):
                if (value := slot.kept.get(name)) is None:
                    continue
                for parameter in own_parameters(value):
                    change.put(parameter, "requires_grad", name in names)
                if name not in names and isinstance(value, Adapter):  # holds on to nothing that it stood on
                    change.item(value._modules, "base_layer", slot.base)
            change.put(slot, "only", None)
        change.put(self, "chosen", tuple(names))
        change.put(self, "odd", self._odd())
        self.settle(change)

    def activate_here(self, change: Change, slot: Slot, names: Sequence[str]) -> None:
        """``activate`` at one place only. Once every layer was given the same, these are the model's active adapters."""
        self.check_set(names)
        self.refuse_while_mixing()
        check_stack({slot.path: slot}, names, self.merged)
        for name, value in slot.kept.items():
            for parameter in own_parameters(value):
                change.put(parameter, "requires_grad", name in names)
        change.put(slot, "only", tuple(names))
        if len({each.only for each in self._layers()}) == 1:
            self.activate(change, names)
        else:
            change.put(self, "odd", self._odd())
            self.settle(change)

    def switch_here(self, change: Change, slot: Slot, on: bool) -> None:
        """Show no adapter at one place, or again what is active there."""
        self.refuse_while_mixing()
        change.put(slot, "off", not on)
        change.put(self, "odd", self._odd())
        self.settle(change)

    def _layers(self) -> list[Slot]:
        """The slots but those of biases, which go with their layers."""
        return [slot for slot in self.slots.values() if isinstance(slot.base, nn.Module)]

    def _odd(self) -> tuple[str, ...]:
        shown = {slot.path: slot for slot in self._layers()}
        some_off = len({slot.off for slot in shown.values()}) > 1
        return tuple(
            path for path, slot in shown.items() if slot.only not in (None, self.chosen) or (some_off and slot.off)
        )

    @property
    def _all_off(self) -> bool:
        layers = self._layers() if any(slot.off for slot in self.slots.values()) else ()
        return bool(layers) and all(slot.off for slot in layers)

    def settle(self, change: Change) -> None:
        """Bring the slots in line with ``chosen``, ``merged`` and ``blocks``; what trains does not change."""
        bare, mixing = self.is_bare, self.mixing
        (chosen, merged) = ((), ()) if bare else (self.chosen, self.merged)
        for slot in self.slots.values():
            if not mixing:
                change.put(slot, "over", None)
            if isinstance(slot.base, nn.Module):
                own = chosen if slot.only is None or bare else slot.only
                slot.show(change, () if slot.off else own, () if slot.off else merged)
        for path, slot in self.slots.items():
            if isinstance(slot.base, nn.Parameter):
                slot.show(change, chosen, merged, self.home(path, bool(merged)))

    def home(self, path: str, merged: bool = False) -> nn.Module:
        """The module that a slot lies in: a bias belongs to whatever layer stands there now."""
        slot, owner = self.slots[path], self.slots.get(path.rpartition(".")[0])
        if not isinstance(slot.base, nn.Parameter) or owner is None:
            return slot.parent
        layer = owner.merged if merged and owner.merged is not None else owner.base
        return layer if isinstance(layer, nn.Module) else slot.parent

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The model without any adapter, merged ones included, while the block runs; one inside another costs nothing.

        It is the model that changes, so every thread sees it. Raises ``StateError`` while a batch mixes adapters.
        """
        block = Block()
        try:
            try:  # twice, so that an interrupt on the way out cannot leave the model bare
                with LOCK, Change() as change:
                    self.refuse_while_mixing()
                    change.put(self, "blocks", (*self.blocks, block))
                    self.settle(change)
                yield
            finally:
                self.leave(block)
        finally:
            self.leave(block)

    def hide(self) -> None:
        """As ``bare``, until ``unhide``. Raises ``StateError`` while a batch mixes adapters."""
        with LOCK, Change() as change:
            self.refuse_while_mixing()
            change.put(self, "blocks", (*self.blocks, Block(lasts=True)))
            self.settle(change)

    def unhide(self) -> None:
        """Undo every ``hide``."""
        for block in self.blocks:
            if block.lasts:
                self.leave(block)

    def leave(self, block: Block) -> None:
        """Close a block, and show what the model shows without it. Closing it again does nothing."""
        block.open = False
        if LOCK._is_owned():  # type: ignore[attr-defined]
            # The garbage collector ends an abandoned generator in the middle of a change on this very thread: right after that change.
            threading.Thread(target=self.leave, args=(block,)).start()
            return
        with LOCK, Change() as change:
            if not all(other.open for other in self.blocks):
                change.put(self, "blocks", tuple(other for other in self.blocks if other.open))
                self.settle(change)


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters were injected into this model. Raises ``StateError`` for what is no model."""
    if not isinstance(model, nn.Module):
        raise StateError(
            f"the model is a {type(model).__name__}; wanted a torch module, such as hf.load_model(name) returns"
        )
    return _ATTRIBUTE in unwrapped(model).__dict__


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what ``torch.compile(model)`` returned, whose paths have no ``_orig_mod`` in them; any other model itself."""
    while set(model._modules) == {"_orig_mod"}:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    return model


def adapters_of(model: nn.Module) -> Adapters:
    """The record of a model's adapters. Raises ``StateError`` if there are none."""
    if not has_adapters(model):
        raise StateError(
            f"{type(model).__name__} has no adapters; call minilora.inject(model, LoraConfig(...)) or get_peft_model first"
        )
    return unwrapped(model).__dict__[_ATTRIBUTE]


def adapters_in(model: nn.Module) -> list[Adapter]:
    """Every adapter that a model has, the inactive ones too; also where another library's names stand in their places."""
    if not has_adapters(model):
        return []
    slots = list(adapters_of(model).slots.values())
    return [value for slot in slots for value in list(slot.kept.values()) if isinstance(value, Adapter)]


def attach(change: Change, model: nn.Module, adapters: Adapters) -> None:
    """Bind the record to the model (it is no submodule and never enters a state dict)."""
    change.item(unwrapped(model).__dict__, _ATTRIBUTE, adapters)


def detach(change: Change, model: nn.Module) -> None:
    """Forget the record: the model is a plain model again, with whatever its slots hold now."""
    change.classes(model.modules())
    take_back(model)
    change.drop(unwrapped(model).__dict__, _ATTRIBUTE)
