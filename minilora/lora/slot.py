"""One place of a model that adapters change, and what may stand in it.

A slot is an attribute of a parent module: a linear layer, a module of which a full copy is trained, or a bias. What sits in it *is* the
state: the base value (no adapter), an adapter around it (active), an adapter around an adapter (several active). Next file:
``lora/slots.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import nn

from minilora.errors import StateError
from minilora.linear.experts.hook import put_projection
from minilora.linear.experts.layers import is_experts
from minilora.linear.packed import hooks_of, take_hooks
from minilora.lora.adapter import Adapter
from minilora.lora.change import Change

Value = nn.Module | nn.Parameter


@dataclass
class Slot:
    """One place: ``parent.attr``, found at ``path`` of the bare model.

    Attributes:
        base: what was there before.
        kept: by adapter name, what goes there instead: an ``Adapter`` (goes around what is there), a trained copy of a module, or a
            trained copy of a bias (these two replace it).
        merged: a layer with adapters folded in, standing in for ``base``; None when nothing is merged.
        hooks: on calls of what stands in the slot, whatever that is: they belong to the place.
        over: what stands in front of all that while batches mix adapters (``many/batched.py``); else None.
        face: what is found in the place by those who look with another library's names, if the model has such faces: it calls what
            stands there (its ``stands``), and is not looked at otherwise.
        only: names of the adapters that this place shows, where it was given its own. off: whether it shows none, whatever is active.
    """

    path: str
    parent: nn.Module
    attr: str
    base: Value
    kept: dict[str, Value] = field(default_factory=dict)
    merged: nn.Module | None = None
    hooks: dict[str, Any] | None = None
    over: nn.Module | None = None
    face: Any = None
    only: tuple[str, ...] | None = None
    off: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.base, nn.Module):
            self.hooks = hooks_of(self.base)

    def show(
        self, change: Change, names: Sequence[str], folded: Collection[str] = (), parent: nn.Module | None = None
    ) -> None:
        """Put the named adapters into the slot, the first innermost; those in ``folded`` are in the merged layer already.

        ``parent`` is where a bias goes when the layer that it belonged to has been replaced.
        """
        value = self.under if folded else self.base
        place = parent or self.parent
        for name in (*folded, *(name for name in names if name not in folded)) if folded else names:
            above = self.kept.get(name)
            if above is None or (name in folded and isinstance(above, Adapter)):
                continue
            if isinstance(above, Adapter):
                change.item(above._modules, "base_layer", value)
            if isinstance(value, nn.Module):
                self._take_hooks(change, value, False)
            _follow(change, value, place)
            value = above
        _follow(change, value, place)
        # What setattr does, without its search for other kinds of attribute.
        if isinstance(value, nn.Module) and is_experts(self.base):
            put_projection(change, place, self.attr, self._front(change, value))
        elif isinstance(value, nn.Module):
            change.item(place._modules, self.attr, self._front(change, value))
        else:
            change.item(place._parameters, self.attr, value)

    def _front(self, change: Change, value: nn.Module) -> nn.Module:
        """What goes into the place: the outermost of ``value``, ``over`` and ``face``, which has the hooks."""
        stands = value if self.over is None else self.over
        found: nn.Module = stands if self.face is None else self.face
        for each in (value, stands):
            if each is not found:
                self._take_hooks(change, each, False)
        self._take_hooks(change, found, True)
        if self.face is not None:
            change.item(vars(self.face), "stands", stands)
        return found

    @property
    def under(self) -> Value:
        """What adapters stand on: ``base``, or the layer that some are merged into."""
        return self.base if self.merged is None else self.merged

    @property
    def standing(self) -> nn.Module:
        """What a call of the place runs, without a face."""
        found = self.parent._modules.get(self.attr, self.under)  # of experts that nothing adapts a parameter is there
        return found if self.face is None else self.face.stands  # type: ignore[return-value]

    def _take_hooks(self, change: Change, layer: nn.Module, stands: bool) -> None:
        """What stands in the slot has the slot's hooks; what is under it has none, and no dictionary into which later ones would come."""
        own, hooks = vars(layer), self.hooks or {}
        if stands:
            full = True if hooks["_backward_hooks"] else None
            right = own["_is_full_backward_hook"] is full and all(own[name] is held for name, held in hooks.items())
        else:
            right = not any(own[name] or own[name] is hooks.get(name) for name in hooks_of(layer))
        if right:
            return
        for name in (*hooks_of(layer), "_is_full_backward_hook"):
            change.note(own, name)
        take_hooks(layer, hooks if stands else None)


def _follow(change: Change, value: Value, place: nn.Module) -> None:
    """What was aside while the model went from train to eval follows now."""
    if isinstance(value, nn.Module) and value.training != place.training:
        change.train(value, place.training)


def own_parameters(value: Value) -> Iterator[nn.Parameter]:
    """The parameters that train: of an adapter all but its base layer's, of a copy all, a bias itself."""
    if isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, Adapter):
        yield from (p for name, p in value._parameters.items() if p is not None and name not in value.fixed)
        for name, part in value._modules.items():
            if name != "base_layer" and part is not None and (part._parameters or part._modules):
                yield from part.parameters()
    else:
        yield from value.parameters()


def check_stack(slots: Mapping[str, Slot], names: Sequence[str], merged: Collection[str]) -> None:
    """Raise ``StateError`` where an adapter that reads the base weight would find another one's update in it, or in a copy."""
    if not merged and len(names) < 2:
        return
    for path, slot in slots.items():
        shown = [name for name in names if name in slot.kept and name not in merged]
        folded = [name for name in merged if name in slot.kept]
        reads = [name for name in shown if isinstance(value := slot.kept[name], Adapter) and value.reads_base]
        if reads and folded:
            raise StateError(
                f"{path}: adapter {reads[0]!r} reads the base weight, in which {folded[0]!r} is merged; unmerge first"
            )
        for other, name in combinations(dict.fromkeys((*folded, *shown)), 2):
            first, second = slot.kept[other], slot.kept[name]
            if isinstance(first, Adapter) and isinstance(second, Adapter) and (why := second.refuses(first)):
                raise StateError(f"{path}: adapters {other!r} and {name!r}: {why}")
        copies = [name for name in (*folded, *shown) if not isinstance(slot.kept[name], Adapter)]
        owner = slots.get(path.rpartition(".")[0])
        moved = owner is not None and any(_shifts_bias(owner.kept.get(name)) for name in merged)
        if copies and isinstance(slot.base, nn.Parameter) and moved:
            raise StateError(
                f"{path}: adapter {copies[0]!r} trains this bias, and a merged lora_bias moves it; merge them one by one"
            )
        if len(copies) > 1:
            raise StateError(
                f"{path}: adapters {copies} each train a copy of it, and copies cannot be added; activate one of them"
            )


def _shifts_bias(value: Value | None) -> bool:
    return isinstance(value, Adapter) and value.delta_bias() is not None
