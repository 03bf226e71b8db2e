"""What can be done with a model that carries adapters: switch, disable, merge, unmerge, count.

Merging is the same for every variant and every base: ``with_weight(base, dense_weight(base) + sum of delta_weight())``, in fp32 and
rounded once. The layer it replaces is kept, so unmerging puts the very same bytes back. Next file: ``checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minilora.adapter import Adapter
from minilora.errors import StateError
from minilora.layers import compute_dtype, dense_weight, is_quantized, with_weight
from minilora.slots import Adapters, Slot, adapters_of, detach

__all__ = ["count_parameters", "disabled", "merge", "set_adapter", "unload", "unmerge"]


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active, trainable ones; of several the updates are added. Raises ``StateError`` for an unknown name."""
    adapters_of(model).activate([names] if isinstance(names, str) else names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare model inside the block: base layers sit in their slots, merged ones included; everything is as before after it."""
    with adapters_of(model).bare():
        yield


def merge(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Fold the named adapters (default: the active ones) into their layers; the originals are kept for ``unmerge``.

    A quantized layer becomes dense in the dtype it had before quantization: requantizing would erase most of a small update.

    Raises:
        StateError: an unknown name, or adapters are merged already. Nothing has changed then.
    """
    adapters = adapters_of(model)
    chosen = tuple(adapters.active if names is None else names)
    adapters.check(chosen)
    if adapters.merged:
        raise StateError(f"adapters {list(adapters.merged)} are merged already; call unmerge first")
    merged = {
        path: layer for path, slot in adapters.slots.items() if (layer := _merged_layer(slot, chosen)) is not None
    }
    for path, layer in merged.items():
        adapters.slots[path].merged = layer
    adapters.merged = chosen
    adapters.show()


def _merged_layer(slot: Slot, names: Sequence[str]) -> nn.Module | None:
    """A layer with the sum of these adapters' updates inside, or None where none of them adapts a weight."""
    folded = [value for name in names if isinstance(value := slot.kept.get(name), Adapter)]
    if not folded or isinstance(slot.base, nn.Parameter):
        return None
    layer = slot.base
    for adapter in folded:
        adapter.base_layer = layer
    with torch.no_grad():
        wide = dense_weight(layer).float() + torch.stack([adapter.delta_weight() for adapter in folded]).sum(0)
    return with_weight(layer, wide.to(compute_dtype(layer))).train(layer.training)


def unmerge(model: nn.Module) -> None:
    """Put the kept layers back: bit-exact in every dtype. Raises ``StateError`` when nothing is merged."""
    adapters = adapters_of(model)
    if not adapters.merged:
        raise StateError("no adapter is merged; nothing to unmerge")
    for slot in adapters.slots.values():
        slot.merged = None
    adapters.merged = ()
    adapters.show()


def unload(model: nn.Module, keep_merged: bool = False) -> nn.Module:
    """Take every adapter out and forget them; with ``keep_merged`` what is merged (and trained copies) stays in place."""
    adapters = adapters_of(model)
    if keep_merged:
        # A merged layer holds its update; copies and biases of merged adapters simply stay in their slots.
        for slot in adapters.slots.values():
            slot.show(adapters.merged, adapters.merged)
    else:
        for slot in adapters.slots.values():
            slot.show(())
    detach(model)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` by PEFT's rule: every parameter once, a packed weight as the weights it stands for, its scales not at all."""
    adapters = adapters_of(model)
    sizes: dict[int, tuple[int, bool]] = {}
    for root in [model, *(value for slot in adapters.slots.values() for value in _modules(adapters, slot))]:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                sizes[id(parameter)] = (_logical_size(module, name, parameter), parameter.requires_grad)
    return sum(size for size, trains in sizes.values() if trains), sum(size for size, _ in sizes.values())


def _modules(adapters: Adapters, slot: Slot) -> list[nn.Module]:
    """What a slot holds besides what is shown (kept biases replace theirs, so they are not counted twice)."""
    return [value for value in (slot.base, *slot.kept.values()) if isinstance(value, nn.Module)]


def _logical_size(module: nn.Module, name: str, parameter: Tensor) -> int:
    if is_quantized(module) and name != "bias":
        return module.out_features * module.in_features if name == "weight" else 0
    return parameter.numel()
