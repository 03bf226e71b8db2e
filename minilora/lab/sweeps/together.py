"""Several adapters in one pass: the rows of each trial go through its own adapter, and through the frozen weights all at once.

While a model is staged, a ``Together`` layer stands in every slot. For a call it takes the product with the base once for all rows, and
adds to each trial's rows that trial's update (``linear/stacked.py``). An adapter that needs the base's product for itself (DoRA scales
it) is called on its own rows. Rows are padded on the right to the longest; a trial's adapter sees its own tokens only, so its dropout
draws what it would draw alone. Next file: ``lab/sweeps/going.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.tokens import IGNORED
from minilora.errors import StateError
from minilora.linear.fused import new_seed
from minilora.linear.layers import carries, frozen_weight
from minilora.linear.stacked import Part, stacked_linear
from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.layer import LoRALinear, is_known_dropout
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters, Block, adapters_of
from minilora.training.losses import token_losses

__all__ = ["Ask", "Stage", "drawing_from", "staged", "why_not_staged"]


@dataclass(frozen=True)
class Ask:
    """Some rows of a call. ``batch``: as ``collate`` makes it. ``stream``: what the adapter's dropout is drawn from."""

    name: str
    batch: Mapping[str, Tensor]
    stream: torch.Generator

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens of the longest."""
        rows, width = self.batch["input_ids"].shape
        return rows, width


@dataclass
class Share:
    """The rows ``first`` to ``last - 1`` of a call, of which the first ``width`` positions are the trial's."""

    ask: Ask
    first: int
    last: int
    # Where the stream stood before a layer drew from it, for the pass that computes activations again.
    drawn: dict[int, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.ask.size[1]


@dataclass
class Stage:
    """A staged model: what of a call belongs to whom.

    Attributes:
        shares: of the call that runs, () outside of one. length: its tokens a row.
        again: whether activations are computed again in the backward pass, which must meet the same masks.
    """

    model: nn.Module
    adapters: Adapters
    again: bool = False
    shares: Sequence[Share] = ()
    length: int = 0
    places: dict[Any, Tensor] = field(default_factory=dict)

    @contextmanager
    def calling(self, asks: Sequence[Ask]) -> Iterator[list[Tensor]]:
        """The losses of every supervised token, ``[tokens]`` for each of the asks; the backward pass belongs into the block."""
        batch, counts = _joined(asks)
        at, shares = 0, []
        for ask in asks:
            shares.append(Share(ask, at, at + ask.size[0]))
            at += ask.size[0]
        self.shares, self.length = shares, batch["input_ids"].shape[1]
        try:
            yield list(token_losses(self.model, batch).split(counts))
        finally:
            self.shares = ()
            self.places.clear()

    def place(self, first: int, rows: int, width: int, device: torch.device) -> Tensor:
        """Where the first ``width`` positions of these rows lie among all positions, int64; made once a call."""
        key = (first, rows, width, device)
        if key not in self.places:
            own = torch.arange(first, first + rows)[:, None] * self.length + torch.arange(width)
            self.places[key] = own.flatten().to(device)
        return self.places[key]


def _joined(asks: Sequence[Ask]) -> tuple[dict[str, Tensor], list[int]]:
    """One batch of all rows, and how many tokens of each ask are learnt. What fills a row up is as ``collate`` and packing fill it up."""
    length = max(ask.size[1] for ask in asks)
    columns: dict[str, list[Tensor]] = {}
    for ask in asks:
        for name, value in ask.batch.items():
            short = length - value.shape[1]
            if name == "position_ids":  # one more example, as in ``data/packing.py``
                filled = torch.cat([value, torch.arange(short).expand(len(value), short)], 1)
            else:
                filled = F.pad(value, (0, short), value=IGNORED if name == "labels" else 0)
            columns.setdefault(name, []).append(filled)
    counts = [int((ask.batch["labels"][:, 1:] != IGNORED).sum()) for ask in asks]
    return {name: torch.cat(values) for name, values in columns.items()}, counts


class Together(nn.Module):
    """Stands in a slot of a staged model; outside of a call it is the slot's usual content."""

    def __init__(self, stage: Stage, slot: Slot) -> None:
        super().__init__()
        usual = slot.standing
        own = self.__dict__  # not through setattr, which would make them children
        own.update(stage=stage, slot=slot, usual=usual)
        own.update({name: usual.__dict__[name] for name in ("_parameters", "_buffers", "_modules", "training")})
        own["_non_persistent_buffers_set"] = usual._non_persistent_buffers_set

    def __getattr__(self, name: str) -> Any:
        """What a model asks a layer for is what its usual content answers."""
        if "usual" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.usual, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        stage: Stage = self.stage
        if not stage.shares:
            return self.usual(x, *args, **kwargs)
        rows = stage.shares[-1].last
        if x[..., 0].numel() != rows * stage.length:
            raise StateError(
                f"{self.slot.path} is given {list(x.shape)} for {rows} rows of {stage.length} tokens, so a trial's rows cannot be told "
                "apart; run the trials one after the other (together=False, --one-by-one)"
            )
        whole = self._of_all(x.reshape(rows, stage.length, x.shape[-1]))
        return whole.reshape(*x.shape[:-1], whole.shape[-1])

    def _of_all(self, x: Tensor) -> Tensor:
        """``[rows, length, in]`` to ``[rows, length, out]``."""
        base, parts, pieces, at = self.slot.base, [], [], 0
        kept = [(share, self.slot.kept.get(share.ask.name)) for share in self.stage.shares]
        how = [_how(adapter, base, x) for _, adapter in kept]
        shared = [share for (share, _), way in zip(kept, how, strict=True) if way != "own"]
        rows = x if len(shared) == len(kept) else torch.cat([x[:0], *(x[share.first : share.last] for share in shared)])
        for (share, adapter), way in zip(kept, how, strict=True):
            count = share.last - share.first
            if way in ("part", "biased"):
                parts.append(self._part(share, adapter, at, x))
            at += 0 if way == "own" else count
        out = _product(base, rows, parts) if shared else None
        if not any(way in ("added", "own", "biased") for way in how):
            assert out is not None
            return out
        at = 0
        for (share, adapter), way in zip(kept, how, strict=True):
            count, own = share.last - share.first, x[share.first : share.last, : share.width]
            short = (0, 0, 0, self.stage.length - share.width)
            if way == "own":
                with self._drawing(share):
                    pieces.append(F.pad(adapter(own), short))
                continue
            assert out is not None
            piece = out[at : at + count]
            at += count
            if way == "added":
                with self._drawing(share):
                    piece = piece + F.pad(adapter.update(adapter.lora_dropout(own)), short)
            elif way == "biased":
                piece = piece + (adapter.scaling * adapter.lora_bias).to(piece.dtype)
            pieces.append(piece)
        return torch.cat(pieces)

    @contextmanager
    def _drawing(self, share: Share) -> Iterator[None]:
        """What this layer draws for a trial comes from the trial's stream; where activations are computed again, the same once more."""
        stream, before = share.ask.stream, share.drawn.get(id(self))
        if before is not None and self.stage.again:
            stream = torch.Generator()
            stream.set_state(before)
        elif self.stage.again:
            share.drawn[id(self)] = stream.get_state()
        with drawing_from(stream):
            yield

    def _part(self, share: Share, adapter: Any, at: int, x: Tensor) -> Part:
        """The update of a plain adapter on the rows of its trial, which begin at row ``at`` of those that are computed."""
        length, count, dropout = self.stage.length, share.last - share.first, adapter.lora_dropout
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        place: slice | Tensor = slice(at * length, (at + count) * length)
        if share.width < length:
            place = self.stage.place(at, count, share.width, x.device)
        seed = 0
        if p:
            with self._drawing(share):
                seed = new_seed(1)
        return Part(place, adapter.lora_A, adapter.lora_B, adapter.scaling, p, seed)


def _how(adapter: Any, base: Any, x: Tensor) -> str:
    """How a trial's rows are computed here: by the base alone, with a part in the one product (and a bias of its own), with an update
    added, or by themselves."""
    if adapter is None:
        return "base"
    if type(adapter).forward is not LoRALinear.forward or adapter.base_layer is not base:
        return "own"
    if type(adapter).update is LoRALinear.update and is_known_dropout(adapter.lora_dropout) and carries(base, x):
        return "part" if adapter.lora_bias is None else "biased"
    return "added"


def _product(base: Any, x: Tensor, parts: Sequence[Part]) -> Tensor:
    if not parts:
        found: Tensor = base(x)
        return found
    return stacked_linear(x, frozen_weight(base), base.bias, parts)


@contextmanager
def drawing_from(stream: torch.Generator) -> Iterator[None]:
    """What is drawn from torch's own generator on the CPU comes from ``stream``."""
    before = torch.get_rng_state()
    torch.set_rng_state(stream.get_state())
    try:
        yield
    finally:
        stream.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


@contextmanager
def staged(model: nn.Module, again: bool = False) -> Iterator[Stage]:
    """The model with its adapters, all kept aside, ready for calls that name them by row. ``again``: as ``Stage.again``."""
    adapters = adapters_of(model)
    stage, block = Stage(model, adapters, again), Block(mixes=True)
    try:
        with LOCK, Change() as change:
            for slot in adapters.slots.values():
                change.put(slot, "over", Together(stage, slot))
            change.put(adapters, "blocks", (*adapters.blocks, block))
            adapters.settle(change)
        yield stage
    finally:
        adapters.leave(block)


def why_not_staged(values: Mapping[str, Any], model: nn.Module) -> str:
    """Why what a trial puts into the model cannot be staged, in words; "" if it can."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, value in values.items():
        if not (isinstance(value, Adapter) and value.on == "linear" and value.targeted):
            return f"{path} is no update of a linear layer"
        if value.innermost is head:
            return f"{path} is the output head"
    return ""
