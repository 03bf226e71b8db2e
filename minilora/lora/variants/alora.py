"""Activated LoRA (Greenewald et al. 2025, arXiv 2504.12397): an update of the tokens from an invocation on, and of none before.

    y = W x                    before the last place where ``alora_invocation_tokens`` begin
    y = W x + s B A x          from there on;  a row without them is the base model's

What comes before the invocation is computed as by the base model, whose cache of keys and values can so be used again. The update
depends on the tokens, so it cannot be merged. A layer does not see tokens: the model's call says where they are (``activated``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, StateError
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.slots import Adapters, adapters_of, has_adapters

__all__ = ["ActivatedLoRA", "activated"]

Tokens = tuple[int, ...]
Lengths = dict[Tokens, Tensor]  # by invocation: how many of the last tokens of each row are active, ``[rows]``


@dataclass
class _Recent:
    """The lengths of the calls that trained since the last backward pass, which a checkpointed layer asks for again."""

    lengths: Lengths | None = None
    several: bool = False
    used: bool = False


_now: ContextVar[tuple[Adapters, Lengths] | None] = ContextVar("minilora_activated", default=None)


@register("alora")
class ActivatedLoRA(LoRALinear):
    """A linear layer whose low-rank update begins where the invocation does. Attributes are those of ``LoRALinear``.

    Raises:
        ConfigError: the config has no ``alora_invocation_tokens``.
    """

    depends_on_input: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        if not config.alora_invocation_tokens:
            raise ConfigError("an activated adapter wants its invocation; give alora_invocation_tokens=[...]")
        super().__init__(base_layer, config, path)
        self.tokens: Tokens = tuple(config.alora_invocation_tokens)
        self.recent = _Recent()

    def update(self, x: Tensor) -> Tensor:
        """``scaling * B A x`` of the active tokens of ``x`` ``[rows, tokens, in]``, 0 for the others."""
        active = self._lengths().to(x.device)
        if x.dim() != 3 or x.shape[0] % len(active):
            raise StateError(
                f"an activated adapter got {list(x.shape)}, wanted [{len(active)} rows, tokens, {self.in_features}]: its layer takes the "
                "tokens of all rows at once; leave it out (exclude_modules)"
            )
        active = active.repeat_interleave(x.shape[0] // len(active))  # a row may have become several beams
        place = torch.arange(x.shape[1], 0, -1, device=x.device)  # counted from the end
        return torch.where((place <= active[:, None])[:, :, None], super().update(x), 0)

    def _lengths(self) -> Tensor:
        recent = self.recent
        if torch._C._current_graph_task_id() != -1:  # a backward pass, which computes a checkpointed layer again
            recent.used = True
            if recent.several or recent.lengths is None:
                raise StateError(
                    "an activated adapter is computed again for a backward pass, after several calls that found the invocation at other "
                    "places; call backward after each forward, or train without gradient checkpointing"
                )
            return recent.lengths[self.tokens]
        said = _now.get()
        if said is None or self.tokens not in said[1]:
            raise StateError(
                "an activated adapter does not know where its invocation begins; call the model that get_peft_model returned with "
                "input_ids, or inside minilora.lora.variants.alora.activated(model, input_ids)"
            )
        if torch.is_grad_enabled() and recent.lengths is not said[1]:
            fresh = recent.used or recent.lengths is None
            recent.several = not fresh and (recent.several or not _same(recent.lengths, said[1]))
            recent.lengths, recent.used = said[1], False
        return said[1][self.tokens]

    def delta_weight(self) -> Tensor:
        raise StateError("an activated adapter (aLoRA) changes some tokens and not others, so it cannot be merged")

    def as_lora(self) -> tuple[Tensor, Tensor]:
        raise StateError("an activated adapter (aLoRA) changes some tokens and not others, so it is no plain LoRA")


def _same(left: Lengths | None, right: Lengths) -> bool:
    return left is not None and all(name in left and torch.equal(left[name], right[name]) for name in right)


@contextmanager
def activated(model: nn.Module, input_ids: Any) -> Iterator[None]:
    """Inside the block the activated adapters of ``model`` begin where their invocation begins in ``input_ids`` ``[rows, tokens]``.

    A block inside another one of the same model changes nothing: ``generate`` looks at the prompt, not at each new token. Raises
    ``StateError`` where such an adapter is active and there are no ids.
    """
    record = adapters_of(model) if has_adapters(model) else None
    wanted = {} if record is None else {
        tuple(tokens) for name in record.active if (tokens := record.configs[name].alora_invocation_tokens)
    }  # fmt: skip
    said = _now.get()
    if record is None or record.is_bare or not wanted or (said is not None and said[0] is record):
        yield
        return
    if not isinstance(input_ids, Tensor):
        raise StateError(
            "an activated adapter looks for its invocation in input_ids, and this call has none; give it token ids"
        )
    ids = input_ids if input_ids.dim() > 1 else input_ids[None]
    block = _now.set((record, {tokens: active_lengths(ids, tokens) for tokens in wanted}))
    try:
        yield
    finally:
        _now.reset(block)


def active_lengths(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """How many tokens of each row stand from the start of its last invocation to its end, ``[rows]``; 0 where there is none."""
    rows, length = ids.shape
    if length < len(tokens):
        return ids.new_zeros(rows)
    begins = (ids.unfold(1, len(tokens), 1) == torch.tensor(list(tokens), device=ids.device)).all(2)
    place = torch.arange(1, begins.shape[1] + 1, device=ids.device)
    last = (begins * place).amax(1)  # counted from 1
    return torch.where(last > 0, length - last + 1, 0)
