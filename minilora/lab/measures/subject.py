"""What is measured: one adapter of a model, alone and in eval mode, for the time of the measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minilora.data.encoding import Encoded
from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.slots import Adapters, adapters_of, unwrapped

__all__ = ["batched", "fixed_updates", "measured"]


@contextmanager
def measured(model: nn.Module, adapter_name: str) -> Iterator[Adapters]:
    """Inside the block the model is in eval mode and shows this adapter alone; then everything is as it was, torch's generators too.

    Raises:
        StateError: no such adapter, one that is merged, or the model runs bare or mixes adapters now. Nothing has changed then.
    """
    record = adapters_of(model)
    record.check([adapter_name])
    _refuse_hidden(record)
    devices = {parameter.device for parameter in unwrapped(model).parameters() if parameter.is_cuda}
    change = Change()
    try:
        try:  # twice, so that an interrupt on the way out cannot leave the model as it is measured
            with LOCK:
                change.train(unwrapped(model), False)
                record.activate(change, [adapter_name])
            with torch.random.fork_rng(devices=devices):
                yield record
        finally:
            change.take_back()
    finally:
        change.take_back()


def _refuse_hidden(record: Adapters) -> None:
    """Refuse a model that would not show what is asked of it."""
    record.refuse_while_mixing()
    if record.is_bare:
        raise StateError("the model's adapters are switched off; measure outside of disable_adapter()")
    if record.merged:
        raise StateError(f"adapters {list(record.merged)} are merged, so the base is not at hand; unmerge first")
    _ = record.active  # which raises where some layers were given others than the rest


def fixed_updates(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """Path to adapter of every layer that an adapter updates.

    Raises:
        StateError: no such adapter, one that updates no layer, or one whose update is another for each input.
    """
    named = adapters_of(model).named(adapter_name)
    found = {path: value for path, value in named.items() if isinstance(value, Adapter)}
    if not found:
        raise StateError(f"adapter {adapter_name!r} updates no layer, so there is nothing to measure")
    for path, adapter in found.items():
        if adapter.depends_on_input:
            raise StateError(
                f"{path}: the update of a {type(adapter).__name__} is another one for each input, so it has no one matrix; "
                "measure a plain LoRA"
            )
    return found


def batched(examples: Sequence[Encoded], batch_size: int) -> Iterator[Sequence[Encoded]]:
    """The examples in their order, ``batch_size`` at a time."""
    return (examples[at : at + batch_size] for at in range(0, len(examples), batch_size))
