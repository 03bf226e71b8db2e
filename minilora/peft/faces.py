"""The model as PEFT's users know it: a ``LoraLayer`` in each adapter's place, and ``base_model.model`` above all.

In minilora an adapter stands in the place of its layer and its matrices are plain parameters; in PEFT a layer holds dictionaries, with an
entry for each adapter, the inactive ones too. A model that comes from ``get_peft_model`` has a *face* in each such place: a module that
has PEFT's names for the same parameters, and that calls what stands there. What is written through it (a parameter, a scaling) is written
into the adapter. Next file: ``peft/shape.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minilora.lora.adapter import Adapter
from minilora.lora.change import Change
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters, adapters_of, unwrapped
from minilora.peft.layers import lora_layer
from minilora.peft.wrappers import is_rows, rows_wrapper, saved_wrapper

__all__ = ["give_faces", "twin"]


def give_faces(change: Change, model: nn.Module) -> None:
    """From now on every slot of this model has a face."""
    adapters = adapters_of(model)
    change.put(adapters, "faces", _refresh)
    _refresh(change, adapters)
    adapters.settle(change)


def _refresh(change: Change, adapters: Adapters) -> None:
    """Make the faces that are missing, and bring the others in line with what their slots keep."""
    for slot in adapters.slots.values():
        if not isinstance(slot.base, nn.Module):
            continue
        old: Any = slot.face
        if old is not None and old.__dict__["content"] == _content(slot):
            continue
        new: Any = _around(slot, adapters)
        new.__dict__["content"] = _content(slot)
        if type(old) is type(new):  # who holds the face sees what is new in it
            for name in ("_modules", "kept", "content"):
                change.item(vars(old), name, vars(new)[name])
        else:
            change.put(slot, "face", new)


def _content(slot: Slot) -> list[int]:
    """What a face was made of."""
    return [id(slot.base), *(id(value) for value in slot.kept.values())]


def _around(slot: Slot, adapters: Adapters) -> nn.Module:
    """What PEFT has in the place of a slot: wrappers for copies and rows inside, the LoRA layer outside."""
    adapting = {name: value for name, value in slot.kept.items() if isinstance(value, Adapter)}
    copies = {name: value for name, value in slot.kept.items() if name not in adapting}
    rows = {name: value for name, value in adapting.items() if is_rows(value)}
    lora = {name: value for name, value in adapting.items() if name not in rows}
    shown: Any = slot.base
    ways: Any = ((copies, saved_wrapper), (rows, rows_wrapper), (lora, lora_layer))
    for kept, wrap in ways:
        if kept:
            shown = wrap(slot, shown, kept, adapters)
    return shown


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
