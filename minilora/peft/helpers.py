"""``peft.helpers``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from minilora.errors import MiniLoraError, StateError
from minilora.lora.layer import LoRALinear
from minilora.lora.slots import adapters_of, has_adapters
from minilora.peft.hub import folder_of
from minilora.store.adapter_files import read_config

__all__ = ["check_if_peft_model", "rescale_adapter_scale"]


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or an id on the Hub, holds an adapter."""
    try:
        read_config(folder_of(model_name_or_path, {}))
    except MiniLoraError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the block the updates of all adapters count ``multiplier`` times. Raises ``StateError`` for a model without LoRA layers."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier={multiplier!r}: wanted a number")
    if not has_adapters(model):
        raise StateError("scaling is only supported for models with LoRA layers; this one has no adapters")
    slots = adapters_of(model).slots.values()
    layers = [value for slot in slots for value in slot.kept.values() if isinstance(value, LoRALinear)]
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling *= multiplier
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
