"""The model as PEFT's users know it: a ``LoraLayer`` in each adapter's place, and ``base_model.model`` above all.

In minilora an adapter stands in the place of its layer and its matrices are plain parameters; in PEFT a layer holds dictionaries, with an
entry for each adapter, the inactive ones too. A model that comes from ``get_peft_model`` has a *face* in each such place: a module that
has PEFT's names for the same parameters, and that calls what stands there. What is written through it (a parameter, a scaling) is written
into the adapter. Next file: ``peft/shape.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from minilora.lora.adapter import Adapter
from minilora.lora.change import Change
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters, adapters_of, unwrapped
from minilora.peft.experts import has_wrapper, wrap
from minilora.peft.layers import lora_layer
from minilora.peft.wrappers import is_rows, rows_wrapper, saved_wrapper

__all__ = ["give_faces", "twin"]


def give_faces(change: Change, model: nn.Module) -> None:
    """From now on every slot of this model has a face."""
    adapters = adapters_of(model)
    change.put(adapters, "faces", partial(_refresh, unwrapped(model)))
    adapters.refresh(change)
    adapters.settle(change)


def _refresh(model: nn.Module, change: Change, adapters: Adapters, name: str | None = None) -> None:
    """Bring the faces in line with what their slots keep of adapter ``name``, which came, went or was replaced (None: with what they
    stand on, after a merge)."""
    for slot in adapters.slots.values():
        if not isinstance(slot.base, nn.Module) or has_wrapper(slot, adapters):
            continue
        if not (_stand(change, slot) if name is None else _follow(change, slot, name)):
            _rebuild(change, slot, adapters)
    wrap(change, model, adapters)


def _stand(change: Change, slot: Slot) -> bool:
    """Put the slot's layer under what a face shows. False where there is no face."""
    face: Any = slot.face
    if face is not None and vars(face)["shown"] is not slot.under:
        shells = vars(face)["shells"]
        shells[next(iter(shells))].stand_on(change, slot.under)
        change.item(vars(face), "shown", slot.under)
    return face is not None


def _follow(change: Change, slot: Slot, name: str) -> bool:
    """Change one entry of a face. False where the face itself must become another."""
    face, value = slot.face, slot.kept.get(name)
    if face is None or vars(face)["shown"] is not slot.under:
        return False
    shells = vars(face)["shells"]
    wanted = None if value is None else _kind_of(value)
    left = [kind for kind, shell in shells.items() if name in shell.kept]
    if wanted is not None and wanted not in shells:
        return False
    if slot.kept and any(kind != wanted and len(shells[kind].kept) == 1 for kind in left):
        return False
    for kind in left:
        shells[kind].leave(change, name)
    if value is not None and wanted is not None:
        shells[wanted].enter(change, name, value)
    return True


def _rebuild(change: Change, slot: Slot, adapters: Adapters) -> None:
    old: Any = slot.face
    new: Any = _around(change, slot, adapters)
    if type(old) is type(new):  # who holds the face sees what is new in it
        for name in ("_modules", "kept", "shown", "shells"):
            change.item(vars(old), name, vars(new)[name])
        shells = vars(old)["shells"]
        change.item(shells, next(reversed(shells)), old)
    else:
        change.put(slot, "face", new)


def _around(change: Change, slot: Slot, adapters: Adapters) -> nn.Module:
    """What PEFT has in the place of a slot: wrappers for copies and rows inside, the LoRA layer outside."""
    shown: Any = slot.under
    shells: dict[str, Any] = {}
    for kind, shell in _SHELLS:
        if kept := {name: value for name, value in slot.kept.items() if _kind_of(value) == kind}:
            shells[kind] = shown = shell(slot, shown, adapters)
            for name, value in kept.items():
                shown.enter(change, name, value)
    vars(shown).update(shells=shells, shown=slot.under)
    return shown


def _kind_of(value: Any) -> str:
    if not isinstance(value, Adapter):
        return "copy"
    return "rows" if is_rows(value) else "lora"


_SHELLS: tuple[tuple[str, Any], ...] = (("copy", saved_wrapper), ("rows", rows_wrapper), ("lora", lora_layer))


def twin(model: nn.Module) -> nn.Module:
    """The same model as an object of its class without PEFT's methods: all attributes are the very same."""
    inner = unwrapped(model)
    # FSDP2 puts a class of its own before all, and works through hooks, which both objects have.
    kind: Any = next((each for each in type(inner).__mro__ if "_extends" in vars(each)), type(inner))
    while "_extends" in vars(kind):
        kind = vars(kind)["_extends"][1]
    other = object.__new__(kind)
    other.__dict__ = inner.__dict__
    return other
