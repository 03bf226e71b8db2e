"""Bytes without memory: run any computation on tensors that have a shape and no storage, and write down what comes and goes.

``on_paper`` copies a model with torch's fake tensors in the place of its weights: every operation then knows shapes, dtypes and what
autograd saves, and allocates nothing, so a model that this machine cannot hold can be run on it. ``Ledger`` sees each operation's
output appear and disappear, as an allocator would; replayed, that gives the peak and who held it. Next file: ``measure/plan.py``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Ledger", "on_paper"]


def on_paper(model: nn.Module) -> nn.Module:
    """A copy of ``model`` (its tensors anywhere, the meta device too) whose weights are fake CPU tensors; ``model`` is untouched.

    What is computed from integers alone (masks, positions, which tokens count) stays real, so that code may look at its values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {}  # deepcopy takes these for copies that are made already; shared weights stay shared
    for tensor in _tensors(model):
        if id(tensor) not in fakes:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
    return copy.deepcopy(model, fakes)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


@dataclass(eq=False)
class Held:
    """A storage: its bytes, the phase it was made in, and what it is (empty: not said)."""

    nbytes: int
    phase: str
    kind: str = ""


class Ledger(TorchDispatchMode):
    """Inside ``with Ledger() as ledger:`` every storage that an operation makes is written down, fake or real.

    Args:
        workspaces: operator to a function of its arguments and its result: the bytes it takes inside and gives back, because a fake
            operator is not looked into.

    Attributes:
        phase: what is going on, set by the caller.
    """

    def __init__(self, workspaces: Mapping[Any, Callable[[Any, Any], int]] | None = None) -> None:
        super().__init__()
        self.phase = ""
        self._workspaces = dict(workspaces or {})
        self._live: dict[int, Held] = {}
        self._events: list[tuple[int, Held, str]] = []  # (+1 or -1, what, phase)

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what these tensors are; those not seen before count from now on."""
        for tensor in tensors:
            self._enter(tensor).kind = kind

    def alive(self) -> list[Held]:
        """What is held now."""
        return list(self._live.values())

    def peak(self) -> tuple[str, dict[str, int]]:
        """``(phase, bytes by kind)`` at the moment when most was held."""
        totals = list(accumulate(sign * held.nbytes for sign, held, _ in self._events))
        if not totals:
            return "", {}
        top = max(range(len(totals)), key=totals.__getitem__)
        parts: dict[str, int] = {}
        for sign, held, _ in self._events[: top + 1]:
            parts[held.kind] = parts.get(held.kind, 0) + sign * held.nbytes
        return self._events[top][2], parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _INDEXING:
            args = (args[0], _counted(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        if func in self._workspaces:
            inside = Held(self._workspaces[func](args, out), self.phase)
            self._events += [(1, inside, self.phase), (-1, inside, self.phase)]
        return out

    def _enter(self, tensor: Tensor) -> Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = Held(storage.nbytes(), self.phase)
            self._events.append((1, self._live[key], self.phase))
            weakref.finalize(storage, self._leave, key)
        return self._live[key]

    def _leave(self, key: int) -> None:
        self._events.append((-1, self._live.pop(key), self.phase))


_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_,
             torch.ops.aten._unsafe_index, torch.ops.aten._unsafe_index_put}  # fmt: skip


def _counted(indices: Any) -> list[Tensor | None]:
    """Boolean masks as the places they select: on fake tensors the number of true values would be unknown, but masks are real here."""
    plain: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        plain += index.nonzero().unbind(1) if is_mask else [index]
    return plain
