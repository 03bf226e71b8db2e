"""Slots: the places of a model that adapters change, and the one record of what sits in each.

A slot is an attribute of a parent module: a linear layer, a module of which a full copy is trained, or a bias. What sits in it *is* the
state: the base value (no adapter), an adapter around it (active), an adapter around an adapter (several active). Switching puts another
object into the slot; nothing is copied, added or asked in ``forward``, and a disabled adapter costs exactly nothing. Adapters that are
not active are kept here, outside the module tree. Next file: ``lora/match.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from minilora.errors import StateError, nearest
from minilora.linear.layers import take_back
from minilora.linear.packed import hooks_of, take_hooks
from minilora.lora.adapter import Adapter
from minilora.lora.config import LoraConfig

Value = nn.Module | nn.Parameter
_ATTRIBUTE = "_minilora_adapters"


@dataclass
class Slot:
    """One place: ``parent.attr``, found at ``path`` of the bare model.

    Attributes:
        base: what was there before.
        kept: by adapter name, what goes there instead: an ``Adapter`` (goes around what is there), a trained copy of a module, or a
            trained copy of a bias (these two replace it).
        merged: a layer with adapters folded in, standing in for ``base``; None when nothing is merged.
    """

    path: str
    parent: nn.Module
    attr: str
    base: Value
    kept: dict[str, Value] = field(default_factory=dict)
    merged: nn.Module | None = None
    hooks: dict[str, Any] | None = (
        None  # on calls of what stands in the slot, whatever that is: they belong to the place
    )

    def __post_init__(self) -> None:
        if isinstance(self.base, nn.Module):
            self.hooks = hooks_of(self.base)

    def show(self, names: Sequence[str], folded: Collection[str] = (), parent: nn.Module | None = None) -> None:
        """Put the named adapters into the slot, the first innermost; those in ``folded`` are in the merged layer already.

        ``parent`` is where a bias goes when the layer that it belonged to has been replaced.
        """
        value: Value = self.merged if folded and self.merged is not None else self.base
        place = parent or self.parent
        for name in (*folded, *(name for name in names if name not in folded)) if folded else names:
            above = self.kept.get(name)
            if above is None or (name in folded and isinstance(above, Adapter)):
                continue
            if isinstance(above, Adapter):
                above._modules["base_layer"] = value  # type: ignore[assignment]
            if isinstance(value, nn.Module):
                take_hooks(value, None)
            _follow(value, place)
            value = above
        _follow(value, place)
        if isinstance(value, nn.Module):
            take_hooks(value, self.hooks)
        if self.attr in place._modules and isinstance(value, nn.Module):
            place._modules[self.attr] = value  # what setattr does, without its search for other kinds of attribute
        else:
            setattr(place, self.attr, value)


def _follow(value: Value, place: nn.Module) -> None:
    """What was aside while the model went from train to eval follows now."""
    if isinstance(value, nn.Module) and value.training != place.training:
        value.train(place.training)


class Adapters:
    """The named adapters of one model.

    Attributes:
        slots: by path. configs, variants: by adapter name. active: names in the slots now, innermost first. merged: names folded
            into the layers.
    """

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.variants: dict[str, str] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self._bare = 0  # how many ``bare`` blocks we are in
        self.mixing = 0  # calls in ``batched`` that run now, on any thread
        self.mixable: set[str] = set()  # names that those calls may use

    def named(self, name: str) -> dict[str, Value]:
        """Path to what adapter ``name`` keeps there. Raises ``StateError`` if there is no such adapter."""
        self.check([name])
        return {path: slot.kept[name] for path, slot in self.slots.items() if name in slot.kept}

    def check(self, names: Iterable[str]) -> None:
        """Raise ``StateError`` for a name that no adapter has."""
        for name in names:
            if name not in self.configs:
                raise StateError(f"no adapter is called {name!r}; there are {nearest(name, self.configs)}")

    def check_set(self, names: Sequence[str]) -> None:
        """``check``, and raise ``StateError`` for a name that comes twice: it would count double."""
        self.check(names)
        if twice := [name for name in names if list(names).count(name) > 1]:
            raise StateError(f"adapter {twice[0]!r} is named twice; name it once")

    def refuse_while_mixing(self) -> None:
        """Raise ``StateError`` while a batch with an adapter for each row runs, on whatever thread: its layers are in the slots."""
        if self.mixing:
            raise StateError("a batch that mixes adapters is running; change the adapters after it")

    def check_stack(self, names: Sequence[str], merged: Collection[str]) -> None:
        """Raise ``StateError`` where an adapter that reads the base weight would find another one's update in it, or in a copy."""
        if not merged and len(names) < 2:
            return
        for path, slot in self.slots.items():
            shown = [name for name in names if name in slot.kept and name not in merged]
            folded = [name for name in merged if name in slot.kept]
            reads = [name for name in shown if isinstance(value := slot.kept[name], Adapter) and value.reads_base]
            if reads and folded:
                raise StateError(
                    f"{path}: adapter {reads[0]!r} reads the base weight, in which {folded[0]!r} is merged; unmerge first"
                )
            copies = [name for name in (*folded, *shown) if not isinstance(slot.kept[name], Adapter)]
            owner = self.slots.get(path.rpartition(".")[0])
            if (
                copies
                and isinstance(slot.base, nn.Parameter)
                and owner
                and any(_shifts_bias(owner.kept.get(n)) for n in merged)
            ):
                raise StateError(
                    f"{path}: adapter {copies[0]!r} trains this bias, and a merged lora_bias moves it; merge them one by one"
                )
            if len(copies) > 1:
                raise StateError(
                    f"{path}: adapters {copies} each train a copy of it, and copies cannot be added; activate one of them"
                )

    def forget(self, name: str) -> None:
        """Take adapter ``name`` out of the record; slots that are left empty go, with their base put back."""
        for slot in self.slots.values():
            slot.kept.pop(name, None)
        for path in [path for path, slot in self.slots.items() if not slot.kept]:
            self.slots.pop(path).show(())
        self.configs.pop(name, None)
        self.variants.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)
        self.show()

    def activate(self, names: Sequence[str]) -> None:
        """Show exactly these adapters (their sum, on top of what is merged) and make exactly their parameters trainable."""
        self.check_set(names)
        self.refuse_while_mixing()
        self.check_stack(names, self.merged)
        self.active = tuple(names)
        for slot in self.slots.values():
            for name, value in slot.kept.items():
                for parameter in own_parameters(value):
                    parameter.requires_grad_(name in names)
        self.show()

    def show(self) -> None:
        """Bring the slots in line with ``active`` and ``merged``; what trains does not change."""
        self.refuse_while_mixing()
        active, merged = ((), ()) if self._bare else (self.active, self.merged)
        for slot in self.slots.values():
            if isinstance(slot.base, nn.Module):
                slot.show(active, merged)
        for path, slot in self.slots.items():
            if isinstance(slot.base, nn.Parameter):  # a bias belongs to whatever layer stands there now
                owner = self.slots.get(path.rpartition(".")[0])
                layer = None if owner is None else owner.merged if merged and owner.merged is not None else owner.base
                slot.show(active, merged, layer if isinstance(layer, nn.Module) else None)

    @property
    def is_bare(self) -> bool:
        """Whether a ``bare`` block runs."""
        return self._bare > 0

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The model without any adapter, merged ones included, while the block runs; one inside another costs nothing."""
        self.refuse_while_mixing()
        self._bare += 1
        try:
            if self._bare == 1:
                self.show()
            yield
        finally:
            self._bare -= 1
            if not self._bare:
                try:
                    self.show()
                except BaseException:  # a Ctrl-C in the middle of it: the slots come first
                    self.show()
                    raise


def _shifts_bias(value: Value | None) -> bool:
    return isinstance(value, Adapter) and value.delta_bias() is not None


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


def attach(model: nn.Module, adapters: Adapters) -> None:
    """Bind the record to the model (it is no submodule and never enters a state dict)."""
    unwrapped(model).__dict__[_ATTRIBUTE] = adapters


def detach(model: nn.Module) -> None:
    """Forget the record: the model is a plain model again, with whatever its slots hold now."""
    take_back(model)
    del unwrapped(model).__dict__[_ATTRIBUTE]
