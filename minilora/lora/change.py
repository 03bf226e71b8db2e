"""All of a change of a model, or none of it: the one mechanism behind every call that changes one.

A call first builds all that is new aside. Then it writes, and every write goes through a ``Change``, which notes what was there before::

    with LOCK, Change() as change:
        change.item(parent._modules, "q_proj", adapter)
        change.put(parameter, "requires_grad", False)

Whatever leaves the block by an error takes all of it back, newest first: an error of torch, a Ctrl-C between two lines, an exception that
a signal handler raises. A change costs what it writes, whatever the size of the model.

A second Ctrl-C while the first is being taken back does not stop that: taking back goes on, and the interrupt is raised after it. What
is not covered is an interrupt that comes in the instant between an *error* inside the block and the first step back; the calls of minilora
refuse before they write, so such an error would be one of torch or of memory. SIGINT itself is never blocked or handled anew, so
this holds in every thread and beside every handler that a program has installed. Next file: ``lora/slot.py``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# One change at a time, whatever its thread or model. It is never held while a model runs, nor while what is new is built. Always taken in
# one ``with`` together with a change: alone, an error that a trace function raises at the end of its block would leave it taken.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a forked process gets a model between two changes, and the lock free
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
_ABSENT: Any = object()


class Change:
    """Writes that are taken back, newest first, when an error leaves the ``with`` block. What is equal already is not written."""

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []

    def __enter__(self) -> Change:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.take_back()

    def take_back(self) -> None:
        """Undo every write. Each step may be repeated, so an interrupt between two of them loses nothing."""
        late: KeyboardInterrupt | None = None
        while self._back:
            try:
                while self._back:
                    self._back[-1]()
                    self._back.pop()
            except KeyboardInterrupt as second:
                late = second
        if late is not None:
            raise late

    def item(self, held: MutableMapping[str, Any], key: str, value: Any) -> None:
        """``held[key] = value``."""
        before = held.get(key, _ABSENT)
        if before is not value:
            self._back.append(
                partial(held.pop, key, None) if before is _ABSENT else partial(held.__setitem__, key, before)
            )
            held[key] = value

    def note(self, held: MutableMapping[str, Any], key: str) -> None:
        """Before somebody else writes ``held[key]``."""
        before = held.get(key, _ABSENT)
        self._back.append(partial(held.pop, key, None) if before is _ABSENT else partial(held.__setitem__, key, before))

    def drop(self, held: MutableMapping[str, Any], key: str) -> None:
        """``del held[key]``, where it is there; taken back, it stands in its old place again."""
        if key in held:
            keys = iter(held)
            following = next((next(keys, None) for each in keys if each == key), None)
            self._back.append(_PutBefore(held, key, held[key], following))
            del held[key]

    def put(self, thing: Any, name: str, value: Any) -> None:
        """``thing.name = value``, for any attribute: ``requires_grad``, ``data`` and ``__class__`` too."""
        before = getattr(thing, name, _ABSENT)
        if before is not value:
            self._back.append(
                partial(_without, thing, name) if before is _ABSENT else partial(setattr, thing, name, before)
            )
            setattr(thing, name, value)

    def keep(self, thing: Any, name: str) -> None:
        """Before somebody else writes ``thing.name``."""
        self._back.append(partial(setattr, thing, name, getattr(thing, name)))

    def overwrite(self, tensor: Tensor, values: Tensor) -> None:
        """``tensor.copy_(values)``, outside autograd; keeps a copy of the old values until the end of the block."""
        self._back.append(partial(_copy, tensor, tensor.detach().clone()))
        _copy(tensor, values)

    def train(self, module: nn.Module, mode: bool) -> None:
        """``module.train(mode)``."""
        for part in module.modules():
            if part.training != mode:
                self._back.append(partial(setattr, part, "training", part.training))
        module.train(mode)

    def classes(self, modules: Iterable[nn.Module]) -> None:
        """Before the classes of layers change: note them."""
        self._back.append(partial(_classes, [(module, type(module)) for module in modules]))

    def watch(self, module: nn.Module) -> None:
        """Before code that is not ours changes a module: note its attributes and what its parts, parameters and hooks are."""
        own = dict(vars(module))
        inside = [(held, dict(held)) for held in own.values() if isinstance(held, dict)]
        self._back.append(partial(_as_it_was, module, type(module), own, inside))


class _PutBefore:
    """Puts a dropped item in front of the one that followed it. What stands behind is looked up once, so that it may be repeated."""

    def __init__(self, held: MutableMapping[str, Any], key: str, value: Any, following: str | None) -> None:
        self.held, self.key, self.value, self.following = held, key, value, following
        self.items: list[tuple[str, Any]] | None = None

    def __call__(self) -> None:
        if self.items is None:
            later = list(self.held.items())
            at = next((place for place, (name, _) in enumerate(later) if name == self.following), len(later))
            self.items = [(self.key, self.value), *later[at:]]
        for key, value in self.items:
            self.held.pop(key, None)
            self.held[key] = value


def _without(thing: Any, name: str) -> None:
    if hasattr(thing, name):
        delattr(thing, name)


@torch.no_grad()
def _copy(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def _classes(kinds: list[tuple[nn.Module, type]]) -> None:
    for module, kind in kinds:
        if type(module) is not kind:
            module.__class__ = kind


def _as_it_was(module: nn.Module, kind: type, own: dict[str, Any], inside: list[tuple[dict, dict]]) -> None:
    _classes([(module, kind)])
    held = vars(module)
    for name in held.keys() - own.keys():
        held.pop(name, None)
    held.update(own)
    for contents, before in inside:
        for key in contents.keys() - before.keys():
            contents.pop(key, None)
        contents.update(before)
