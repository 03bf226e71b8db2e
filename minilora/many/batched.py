"""A different adapter for every row of a batch, in one forward.

While such a batch runs, each adapted slot holds a ``MixedLayer`` with the factors of all adapters stacked. It picks each row's factors
and takes one batched product; there is no loop over adapters. Which adapter a row wants comes with the call, in a context variable, so
threads that serve different batches at the same time cannot mix them up.
Next file: ``training/loop.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.layers import embed_scale
from minilora.linear.packed import take_hooks
from minilora.linear.shown import shown_weight
from minilora.lora.adapter import Adapter
from minilora.lora.slots import Adapters, Slot, adapters_of

__all__ = ["BASE", "batch_adapters"]

BASE = "__base__"  # the name that stands for no adapter
_LOCK = threading.RLock()  # installing and removing mixed layers; never held during a forward


@dataclass
class _Rows:
    """The rows of the running call: index of each row's adapter in the stacks, kept once per device."""

    index: list[int]
    on: dict[torch.device, Tensor] = field(default_factory=dict)

    def pick(self, x: Tensor) -> Tensor:
        """One index for each row of ``x``; a row of the call may have become several (beams, flattened tokens)."""
        repeats, rest = divmod(x.shape[0], len(self.index))
        if rest:
            raise StateError(
                f"{len(self.index)} adapter names for {x.shape[0]} rows; wanted one name for each row of the batch"
            )
        if x.device not in self.on:
            self.on[x.device] = torch.tensor(self.index, device=x.device)
        return self.on[x.device].repeat_interleave(repeats) if repeats > 1 else self.on[x.device]


_rows: ContextVar[_Rows | None] = ContextVar("minilora_batch_rows", default=None)


class MixedLayer(nn.Module):
    """Stands in a slot during mixed batches: the usual content for calls that name no adapters, the base plus picked rows for others.

    Attributes:
        A: ``[adapters + 1, r, in]``, B: ``[adapters + 1, out, r]``: scaled, ranks filled up with zeros, the last row zero for the base.
    """

    def __init__(self, slot: Slot, names: Sequence[str]) -> None:
        super().__init__()
        self.usual: nn.Module = getattr(slot.parent, slot.attr)
        self.base: nn.Module = slot.base  # type: ignore[assignment]
        self.is_table = isinstance(slot.base, nn.Embedding)
        take_hooks(self, slot.hooks)
        self.scale = embed_scale(self.base)
        pairs = [_low_rank(slot, name) for name in names]
        known = next((pair for pair in pairs if pair is not None), None)
        self.A: Tensor | None = None
        if known is None:  # nobody adapts this layer: every row gets the base
            return
        r = max(len(pair[0]) for pair in pairs if pair is not None)
        self.A = known[0].new_zeros(len(names) + 1, r, known[0].shape[1])
        self.B = known[1].new_zeros(len(names) + 1, known[1].shape[0], r)
        for place, pair in enumerate(pairs):
            if pair is not None:
                self.A[place, : len(pair[0])], self.B[place, :, : len(pair[0])] = pair

    def forward(self, x: Tensor) -> Tensor:
        rows = _rows.get()
        if rows is None:
            return self.usual.forward(x)  # its hooks are on this layer
        pick, base = rows.pick(x), self.base(x)
        if self.A is None:
            return base
        flat = x.reshape(len(pick), -1) if self.is_table else x.reshape(len(pick), -1, x.shape[-1])
        if self.is_table:
            thin = self.B[pick[:, None], flat].to(base.dtype)
            update = torch.bmm(thin, self.A[pick].to(base.dtype)) * self.scale
        else:
            thin = torch.bmm(flat, self.A[pick].to(x.dtype).transpose(1, 2))
            update = torch.bmm(thin, self.B[pick].to(x.dtype).transpose(1, 2))
        return base + update.view_as(base)

    @property
    def weight(self) -> Tensor:
        """For models that look at its dtype; one weight cannot be another one for every row, so nobody computes with it."""
        stored: Tensor = self.base.weight  # type: ignore[assignment]
        return shown_weight(_refuse_to_read, stored.shape, stored.dtype, stored.device)


def _refuse_to_read() -> Tensor:
    raise StateError(
        "a layer's weight is read by its model and the layer not called, so it cannot differ from row to row; use set_adapter instead"
    )


def _low_rank(slot: Slot, name: str) -> tuple[Tensor, Tensor] | None:
    """The adapter's scaled factors at this slot; None where it has none."""
    value = slot.kept.get(name)
    if value is None:
        return None
    if not isinstance(value, Adapter):
        raise StateError(
            f"adapter {name!r} trains a copy of {slot.path}, which cannot differ from row to row; use set_adapter instead"
        )
    try:
        A, B = value.as_lora()
    except StateError as error:
        raise StateError(f"adapter {name!r}, {slot.path}: {error}") from None
    return A.detach(), B.detach()


@contextmanager
def batch_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block every forward of this thread gives row ``i`` of the batch the adapter ``names[i]``; "__base__" means none.

    Raises:
        StateError: an unknown name, training mode, merged adapters, or an adapter whose update is no low-rank product (DoRA).
    """
    adapters = adapters_of(model)
    adapters.check(name for name in names if name != BASE)
    if not names:
        raise StateError("no adapter names; wanted one for each row of the batch")
    if model.training:
        raise StateError("batches that mix adapters are for inference; call model.eval() first")
    order = list(adapters.configs)
    index = [len(order) if name == BASE else order.index(name) for name in names]
    _enter(adapters, set(names) - {BASE})
    token = _rows.set(_Rows(index))
    try:
        yield
    finally:
        _rows.reset(token)
        _leave(adapters)


def _enter(adapters: Adapters, names: set[str]) -> None:
    """Put mixed layers into the slots for the first of the calls that run now."""
    with _LOCK:
        if adapters.is_bare:
            raise StateError("adapters are disabled here; leave disable_adapter() before mixing adapters in a batch")
        if adapters.merged:
            raise StateError(f"adapters {list(adapters.merged)} are merged; unmerge before mixing adapters in a batch")
        if adapters.mixing and not names <= adapters.mixable:
            raise StateError(
                f"adapters {sorted(names)}: the batches that run now were prepared without one of them; try again after them"
            )
        if not adapters.mixing:
            adapters.mixable = _install(adapters, names)
        adapters.mixing += 1


def _install(adapters: Adapters, wanted: set[str]) -> set[str]:
    """Build a mixed layer for every slot from the adapters that can be mixed, ``wanted`` among them; returns their names."""
    for path, slot in adapters.slots.items():
        if shown := [
            name for name in adapters.active if name in slot.kept and not isinstance(slot.kept[name], Adapter)
        ]:
            raise StateError(
                f"adapter {shown[0]!r} is active and trains a copy of {path}, which every row would get; activate another"
            )
    able = set(adapters.configs)
    for slot in adapters.slots.values():
        for name in slot.kept:
            try:
                _low_rank(slot, name)
            except StateError:
                if name in wanted:
                    raise
                able.discard(name)
    order = [name if name in able else "" for name in adapters.configs]
    modules = [slot for slot in adapters.slots.values() if isinstance(slot.base, nn.Module)]
    # Built anew each time: parameters can change in ways that leave no trace (a fused optimizer, writes to .data).
    layers = [MixedLayer(slot, order).eval() for slot in modules]
    for slot, layer in zip(modules, layers, strict=True):
        setattr(slot.parent, slot.attr, layer)
    return able


def _leave(adapters: Adapters) -> None:
    with _LOCK:
        adapters.mixing -= 1
        if not adapters.mixing:
            adapters.show()
