"""A different adapter for every row of a batch, in one forward.

While such a batch runs, each adapted slot holds a ``MixedLayer`` in front of its usual content. For a call that named adapters it picks
each row's factors out of a stack and takes one batched product; there is no loop over adapters. The stacks are built for the call, from
the adapters that the call names and no other. Where an adapter trains token rows or a copy of the module, its rows of the batch are
computed by these, one adapter after the other. Which adapter a row wants belongs to one model and one context: it comes in a context
variable, as the rows of a block, so neither another thread's forward nor another model's sees it.

A block covers the code that runs in its context, tasks and ``asyncio.to_thread`` started inside it included, as long as it is open.
Of several blocks of one model the innermost counts. A generator that holds a block and is stepped from several contexts (a web server
steps it from a thread each time) has its rows in the first of them only: name the adapters with each call there,
``model(x, adapter_names=[...])``. However it ends, closed elsewhere or by the garbage collector, its block ends with it.
Next file: ``training/loop.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.convolution import convolve_rows, is_convolution
from minilora.linear.experts.known import known_experts
from minilora.linear.experts.routes import Routes, route
from minilora.linear.layers import embed_scale
from minilora.linear.shown import shown_weight
from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters, Block, adapters_of
from minilora.lora.variants.attention import LoRAAttention, LoRAOutProj
from minilora.lora.variants.experts import thin
from minilora.lora.variants.router import LoRARouter
from minilora.lora.variants.tokens import TiedRows, TiedTable, TokenRows

__all__ = ["BASE", "batch_adapters"]

BASE = "__base__"  # the name that stands for no adapter
Factors = tuple[Tensor, Tensor]


@dataclass(eq=False, kw_only=True)
class Rows(Block):
    """The rows of one block: whose they are, each row's place in the stacks, the stacks, and what is computed apart.

    Attributes:
        stacks: by path of the slot ``(A [names + 1, r, in], B [names + 1, out, r])``: scaled, ranks filled up with zeros, the last row zero
            for the base; of experts with their dimension after the first; None where none of the names adapts the layer.
        apart: by path, place in the stacks to what computes the rows of that adapter there: token rows, or a copy of the module.
        on: ``index`` as a tensor, kept once per device.
    """

    adapters: Adapters
    index: Sequence[int]
    mixes: bool = True
    stacks: dict[str, Factors | None] = field(default_factory=dict)
    apart: dict[str, dict[int, nn.Module]] = field(default_factory=dict)
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


# Every block that this context is in, outermost first, closed ones of other contexts among them.
_blocks: ContextVar[tuple[Rows, ...]] = ContextVar("minilora_batch_rows", default=())


def _rows_of(adapters: Adapters) -> Rows | None:
    """The innermost open block of this context for the model with this record."""
    for rows in reversed(_blocks.get()):
        if rows.adapters is adapters and rows.open:
            return rows
    return None


class MixedLayer(nn.Module):
    """Stands in a slot during mixed batches: the usual content for calls that name no adapters, the base plus picked rows for others.

    Its parameters and children are the usual content's own, so a state dict that another thread takes meanwhile is the usual one.
    """

    def __init__(self, adapters: Adapters, slot: Slot) -> None:
        super().__init__()
        usual = slot.standing
        own = self.__dict__  # not through setattr, which would make them children
        own.update(adapters=adapters, path=slot.path, usual=usual, base=slot.base, scale=embed_scale(slot.base))  # type: ignore[arg-type]
        own.update({name: usual.__dict__[name] for name in ("_parameters", "_buffers", "_modules", "training")})
        own["_non_persistent_buffers_set"] = usual._non_persistent_buffers_set

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = _rows_of(self.adapters)
        if rows is None:
            return self.usual(*args, **kwargs)
        base = self.base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Tensor) and (routes := _routes_in(args, kwargs)) is not None:
            return self._of_experts(rows, x, routes, base)
        if (stack := rows.stacks.get(self.path)) is not None:
            base = self._with_update(rows.pick(x), x, base, stack)
        if apart := rows.apart.get(self.path):
            known = known_experts(self.base) if isinstance(self.base, nn.Module) else None
            if known is not None and known.forward in ("llama4", "jetmoe"):
                raise StateError(
                    f"{self.path}: its rows are sorted by expert, so a trained copy of it cannot differ from row to row; use set_adapter"
                )
            base = _with_rows_of(apart, rows.pick(x), base, args, kwargs)
        return base

    def _of_experts(self, rows: Rows, x: Tensor, routes: Routes, base: Tensor) -> Tensor:
        """Of experts: as if each adapter's were experts of their own, among which the row and the router's choice decide."""
        stack = rows.stacks.get(self.path)
        if stack is None:
            return base
        A, B = stack  # [names + 1, E, ...]
        if (known := routes.in_batch) is None:
            raise StateError(
                f"{self.path}: its experts get rows that nobody says whose they are, so adapters cannot differ from row to row; use "
                "set_adapter instead"
            )
        tokens, count = known
        pick = rows.pick(routes.order.new_empty(count))[tokens]
        count = A.shape[1]
        choice = torch.where(routes.ids < count, pick * count + routes.ids, len(A) * count)
        own = route(choice, len(A) * count)
        update = thin(x[own.order], A.flatten(0, 1), B.flatten(0, 1), own)
        return base.index_add(0, own.order, update.to(base.dtype))

    def _with_update(self, pick: Tensor, x: Tensor, base: Tensor, stack: Factors) -> Tensor:
        A, B = stack
        if is_convolution(self.base):
            return base + convolve_rows(self.base, x, A[pick].to(x.dtype), B[pick].to(x.dtype)).view_as(base)
        if isinstance(self.base, nn.Embedding):
            thin = B[pick[:, None], x.reshape(len(pick), -1)].to(base.dtype)
            update = torch.bmm(thin, A[pick].to(base.dtype)) * self.scale
        else:
            thin = torch.bmm(x.reshape(len(pick), -1, x.shape[-1]), A[pick].to(x.dtype).transpose(1, 2))
            update = torch.bmm(thin, B[pick].to(x.dtype).transpose(1, 2))
        return base + update.view_as(base)

    @property
    def weight(self) -> Tensor:
        """For models that look at its dtype; one weight cannot be another one for every row, so nobody computes with it."""
        rows = _rows_of(self.adapters)
        if rows is None or rows.stacks.get(self.path) is None:
            return (self.usual if rows is None else self.base).weight
        stored: Tensor = self.base.weight
        return shown_weight(_refuse_to_read, stored.shape, stored.dtype, stored.device)

    def __getattr__(self, name: str) -> Any:
        """What a model asks a layer for (sizes, a bias) is what its usual content answers; for a mixed batch, its base."""
        if "usual" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.usual if _rows_of(self.adapters) is None else self.base, name)


def _routes_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routes | None:
    """What a projection of experts is called with beside its rows."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Routes)), None)


def _with_rows_of(
    apart: Mapping[int, nn.Module], pick: Tensor, base: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """``base`` with the rows in it that modules of their own compute."""
    if not isinstance(base, Tensor) or len(base) != len(pick):
        what = f"a tensor of {len(base)} rows" if isinstance(base, Tensor) else f"a {type(base).__name__}"
        raise StateError(
            f"a module of which an adapter trains a copy returns {what} for {len(pick)} rows; wanted one for each row, use set_adapter"
        )

    def part(value: Any, chosen: Tensor) -> Any:
        return value[chosen] if isinstance(value, Tensor) and value.dim() and len(value) == len(pick) else value

    for place, module in apart.items():
        chosen = (pick == place).nonzero().flatten()
        if len(chosen):
            own = module(*(part(value, chosen) for value in args), **{k: part(v, chosen) for k, v in kwargs.items()})
            base = base.index_copy(0, chosen, own.to(base.dtype))
    return base


def _refuse_to_read() -> Tensor:
    raise StateError(
        "a layer's weight is read by its model and the layer not called, so it cannot differ from row to row; use set_adapter instead"
    )


@contextmanager
def batch_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block every forward of this context gives row ``i`` of the batch the adapter ``names[i]``; "__base__" means none.

    The values are the adapters' at the start of the block. A context is a thread's or a task's: what the block hands to a
    ``ThreadPoolExecutor`` runs in another one, with the adapter that is active, unless it is run in ``contextvars.copy_context()``
    (``asyncio.to_thread`` does that).

    Raises:
        StateError: an unknown name, training mode, merged adapters, a model without adapters in a ``disable_adapter`` block, or an adapter
            whose update is no low-rank product (DoRA).
    """
    adapters = adapters_of(model)
    if not names:
        raise StateError("no adapter names; wanted one for each row of the batch")
    if model.training:
        raise StateError("batches that mix adapters are for inference; call model.eval() first")
    wanted = list(dict.fromkeys(name for name in names if name != BASE))
    rows = Rows(adapters=adapters, index=[len(wanted) if name == BASE else wanted.index(name) for name in names])
    try:
        try:  # twice, so that an interrupt on the way out cannot leave the block open
            with LOCK, Change() as change:
                _enter(change, adapters, rows, wanted)
            _blocks.set((*(other for other in _blocks.get() if other.open), rows))
            yield
        finally:
            _leave(rows)
    finally:
        _leave(rows)


def _enter(change: Change, adapters: Adapters, rows: Rows, names: Sequence[str]) -> None:
    """Build the block's stacks; put mixed layers into the slots that have none, for the first of the blocks that run now all."""
    adapters.check(names)
    if adapters.is_bare:
        raise StateError("adapters are disabled here; leave disable_adapter() before mixing adapters in a batch")
    if adapters.merged:
        raise StateError(f"adapters {list(adapters.merged)} are merged; unmerge before mixing adapters in a batch")
    for path, slot in adapters.slots.items():
        if shown := [name for name in adapters.active if isinstance(slot.kept.get(name), nn.Parameter)]:
            raise StateError(
                f"adapter {shown[0]!r} is active and trains {path}, which every row would get; activate another"
            )
        rows.apart[path] = {at: part for at, name in enumerate(names) if (part := _apart(slot, name)) is not None}
        rows.stacks[path] = _stack(slot, names)
        for module in rows.apart[path].values():
            change.train(module, False)  # it may have been aside since the model trained
    first = not adapters.mixing
    for slot in adapters.slots.values():
        if isinstance(slot.base, nn.Module) and (first or slot.over is None):
            change.put(slot, "over", MixedLayer(adapters, slot))
    change.put(adapters, "blocks", (*adapters.blocks, rows))
    adapters.settle(change)


def _leave(rows: Rows) -> None:
    """Close the block, wherever this runs, and forget it in this context. Closing it again does nothing."""
    rows.adapters.leave(rows)
    _blocks.set(tuple(other for other in _blocks.get() if other.open))


def _stack(slot: Slot, names: Sequence[str]) -> Factors | None:
    """The factors of these adapters at one slot, stacked; None where none of them has any."""
    pairs = [_low_rank(slot, name) for name in names]
    known = next((pair for pair in pairs if pair is not None), None)
    if known is None:
        return None
    r = max(pair[0].shape[-2] for pair in pairs if pair is not None)
    A = known[0].new_zeros(len(names) + 1, *known[0].shape[:-2], r, known[0].shape[-1])
    B = known[1].new_zeros(len(names) + 1, *known[1].shape[:-1], r)
    for place, pair in enumerate(pairs):
        if pair is not None:
            own = pair[0].shape[-2]
            A[place, ..., :own, :], B[place, ..., :own] = pair
    return A, B


def _apart(slot: Slot, name: str) -> nn.Module | None:
    """What computes the adapter's rows at this slot where it is no low-rank update of the layer."""
    value = slot.kept.get(name)
    if isinstance(value, (TokenRows, TiedTable, TiedRows)):
        return value.alone_on(slot.base)  # type: ignore[arg-type]
    return value if isinstance(value, nn.Module) and not isinstance(value, Adapter) else None


def _low_rank(slot: Slot, name: str) -> Factors | None:
    """The adapter's scaled factors at this slot; None where it has none, or computes its rows apart."""
    value = slot.kept.get(name)
    if value is None or _apart(slot, name) is not None:
        return None
    if not isinstance(value, Adapter):
        raise StateError(
            f"adapter {name!r} trains {slot.path}, a bias, which cannot differ from row to row; use set_adapter instead"
        )
    if isinstance(value, (LoRAAttention, LoRAOutProj, LoRARouter)):
        kind = "router" if isinstance(value, LoRARouter) else "MultiheadAttention"
        raise StateError(
            f"adapter {name!r}, {slot.path}: the weights of a {kind} are read and not called, so they cannot differ from row "
            "to row; use set_adapter instead"
        )
    try:
        A, B = value.as_lora()
    except StateError as error:
        raise StateError(f"adapter {name!r}, {slot.path}: {error}") from None
    return A.detach(), B.detach()
