"""Merging: the update of adapters inside the weights, and back out to the bit.

It is the same for every variant and every base: ``with_weight(base, dense_weight(base) + sum of delta_weight())``, in fp32 and rounded
once, and it says how much of the update survived the rounding. The layer it replaces is kept, so unmerging puts the very same
bytes back. Next file: ``store/load.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.foreign import foreign_of
from minilora.linear.layers import (
    compute_dtype,
    dense_weight,
    is_foreign,
    is_quantized,
    packed_like,
    stored_weight,
    weight_name,
    with_weight,
)
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.bases import refuse_to_replace
from minilora.lora.change import LOCK, Change
from minilora.lora.slot import Slot, check_stack, own_parameters
from minilora.lora.slots import Adapters, adapters_of
from minilora.lora.tying import holders
from minilora.quant.finite import is_finite

__all__ = ["MergeReport", "Merged", "merge", "merged_layers", "put_in", "unmerge"]


@dataclass(frozen=True)
class MergeReport:
    """How much of an update is left after rounding to the weights' format.

    Attributes:
        layers: path to ``1 - |(merged - base) - update| / |update|``, at least 0: 1 is all of it, 0 is none.
        survived: the same over all layers together.
        into: what the weights are stored in.
    """

    layers: dict[str, float]
    survived: float
    into: str

    def __str__(self) -> str:
        worst = min(self.layers, key=self.layers.__getitem__, default="")
        least = f"; least in {worst}: {self.layers[worst]:.1%}" if worst else ""
        return f"merged into {len(self.layers)} layers as {self.into}: {self.survived:.1%} of the update survives rounding{least}"


def merge(model: nn.Module, names: Sequence[str] | None = None, requantize: bool = False) -> MergeReport:
    """Fold the named adapters (default: the active ones) into their layers; the originals are kept for ``unmerge``.

    A quantized layer becomes dense in the dtype it had before quantization, unless ``requantize``: four bits erase most of a small
    update, and the report says how much. Adapters that are active and not named go on working on top. Where others are merged already,
    the sum of all is folded into the originals anew. All merged layers are made aside, and the model works on with its adapters until
    they are put in.

    Raises:
        StateError: an unknown name, one that is merged already, a layer shares its weight with one that would not change, an adapter
            holds NaN or infinity, or a merged weight overflows its dtype. Nothing has changed then, nor after any other failure.
    """
    merged = merged_layers(model, names, requantize)
    with LOCK, Change() as change:
        put_in(change, model, merged)
    return merged.report


@dataclass(frozen=True)
class Merged:
    """Layers with the updates of adapters ``names`` inside, by path, not yet in the model; ``before`` were merged when they were made."""

    names: tuple[str, ...]
    before: tuple[str, ...]
    folded: dict[str, list[Adapter]]
    layers: dict[str, nn.Module]
    report: MergeReport


def merged_layers(model: nn.Module, names: Sequence[str] | None = None, requantize: bool = False) -> Merged:
    """What ``merge`` puts into the model, which is not touched. Raises as ``merge``."""
    adapters = adapters_of(model)
    before = adapters.merged
    named = adapters.active if names is None else [names] if isinstance(names, str) else names
    chosen = (*before, *named)
    _check_merge(adapters, chosen, before)
    folded = _folded(adapters, chosen)
    _refuse_nonfinite(adapters, chosen)
    _refuse_shared(model, adapters, folded)
    layers: dict[str, nn.Module] = {}
    losses: dict[str, tuple[float, float]] = {}
    for path in folded:
        refuse_to_replace(path, adapters.slots[path].base)  # type: ignore[arg-type]
    flowing = _flowing(Bare(model))
    for path, adapters_here in folded.items():
        layers[path], losses[path] = _merged_layer(adapters.slots[path], adapters_here, requantize, flowing)
    _share_again(adapters, layers)
    return Merged(chosen, before, folded, layers, _report(layers, losses))


def _check_merge(adapters: Adapters, names: Sequence[str], before: Sequence[str]) -> None:
    """``names``: what shall be merged then. ``before``: what is merged now."""
    adapters.check(names)
    again = [name for name in names[len(before) :] if name in before]
    if again or adapters.merged != before:
        raise StateError(f"adapters {again or list(adapters.merged)} are merged already; call unmerge first")
    adapters.check_set(names)
    if not names:
        raise StateError("no adapter is active, so there is nothing to merge; name one, or set_adapter first")
    check_stack(adapters.slots, [*adapters.active, *names], names)


def put_in(change: Change, model: nn.Module, merged: Merged) -> None:
    """Merged layers into the slots. Raises ``StateError`` if the adapters have changed since they were made."""
    adapters = adapters_of(model)
    _check_merge(adapters, merged.names, merged.before)
    adapters.refuse_while_mixing()
    if _folded(adapters, merged.names) != merged.folded:
        raise StateError(
            f"adapters {list(merged.names)} were changed by another thread while they were merged; merge again"
        )
    for path, layer in merged.layers.items():
        change.put(adapters.slots[path], "merged", layer)
    change.put(adapters, "merged", merged.names)
    adapters.refresh(change)
    adapters.settle(change)


def _refuse_nonfinite(adapters: Adapters, names: Sequence[str]) -> None:
    for path, slot in adapters.slots.items():
        for name in names:
            values = own_parameters(slot.kept[name]) if name in slot.kept else ()
            if not all(map(is_finite, values)):
                raise StateError(
                    f"{path}: NaNs detected in the merged weights. The adapter {name} seems to be broken: it holds NaN or infinity; "
                    "load an earlier save of it"
                )


def _folded(adapters: Adapters, names: Sequence[str]) -> dict[str, list[Adapter]]:
    """Path to the adapters of these names there, where there are any."""
    found = {
        path: [value for name in names if isinstance(value := slot.kept.get(name), Adapter)]
        for path, slot in list(adapters.slots.items())
    }
    return {path: values for path, values in found.items() if values}


def _flowing(bare: Bare) -> torch.dtype | None:
    """The dtype in which a model computes beside its packed layers: its first floating parameter's; None if it has none."""
    packed = {id(stored_weight(module)) for module in bare.modules() if foreign_of(module) is not None}
    floating = (p.dtype for _, p in bare.named_parameters() if p.is_floating_point() and id(p) not in packed)
    return next(floating, None)


def _merged_layer(
    slot: Slot, folded: Sequence[Adapter], requantize: bool, flowing: torch.dtype | None
) -> tuple[nn.Module, tuple[float, float]]:
    """A layer with the sum of the updates inside, and ``(|error|^2, |update|^2)``."""
    base: Any = slot.base
    foreign = foreign_of(base)
    if requantize and foreign is not None:
        raise StateError(
            f"{slot.path}: a {type(base).__name__} of another library is merged to a dense layer only; leave requantize out"
        )
    kind = (
        flowing if foreign is not None and flowing else compute_dtype(base)
    )  # they take and give any dtype, a dense one does not
    alone = [adapter.alone_on(base) for adapter in folded]
    with torch.no_grad():
        before = dense_weight(base)
        update = torch.stack([adapter.delta_weight() for adapter in alone]).sum(0)
        merged = (before.float() + update).to(kind)
        shifts = [shift for adapter in alone if (shift := adapter.delta_bias()) is not None]
        bias = _moved_bias(base, shifts, kind) if shifts else None
    if not is_finite(before):
        raise StateError(
            f"{slot.path}: its base weight holds NaN or infinity, so nothing is merged into it; load it again"
        )
    finite = is_finite(merged) and (bias is None or is_finite(bias))
    if not finite:
        raise StateError(
            f"{slot.path}: the merged weight overflows {merged.dtype}; load the model in bfloat16 or float32"
        )
    layer = with_weight(base, merged, bias).train(base.training)
    if requantize and is_quantized(base):
        layer = packed_like(base, layer, slot.path)
    error = (dense_weight(layer).float() - before.float()) - update
    return layer, (float(error.square().sum()), float(update.square().sum()))


def _moved_bias(base: nn.Module, shifts: Sequence[Tensor], kind: torch.dtype) -> Tensor:
    shift = torch.stack(list(shifts)).sum(0)
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return shift.to(kind) if bias is None else (bias.float() + shift).to(kind if is_foreign(base) else bias.dtype)


def _refuse_shared(model: nn.Module, adapters: Adapters, folded: dict[str, list[Adapter]]) -> None:
    """A weight that two layers share must change in both, or saving and reloading would give another model."""
    held_by = holders(Bare(model))
    for path in folded:
        base = adapters.slots[path].base
        others = [other for other in held_by.get(id(stored_weight(base)), ()) if other not in folded]
        if others:
            raise StateError(
                f"{path} shares its weight with {others[0]}, which would not change; call minilora.untie(model) first if one of them is an "
                "embedding, or leave it out (exclude_modules)"
            )


def _share_again(adapters: Adapters, layers: dict[str, nn.Module]) -> None:
    """Layers that shared a weight share the merged one. Raises ``StateError`` where their updates make two of it."""
    first: dict[int, str] = {}
    for path, layer in layers.items():
        twin = first.setdefault(id(stored_weight(adapters.slots[path].base)), path)
        if twin == path:
            continue
        if not torch.equal(dense_weight(layer), dense_weight(layers[twin])):
            raise StateError(
                f"{path} shares its weight with {twin} and their updates differ, so one weight cannot hold both; leave both out "
                "(exclude_modules), or give one a copy of the weight; for an embedding and its head minilora.untie(model) does that, and "
                "ensure_weight_tying=True adapts both alike"
            )
        layer._parameters[weight_name(layer)] = stored_weight(layers[twin])


def _report(layers: dict[str, nn.Module], losses: dict[str, tuple[float, float]]) -> MergeReport:
    def share(error: float, update: float) -> float:
        return 1.0 if update == 0 else max(0.0, 1 - (error / update) ** 0.5)

    kinds = {
        layer.format if is_quantized(layer) else str(compute_dtype(layer)).removeprefix("torch.")
        for layer in layers.values()
    }
    whole = share(sum(error for error, _ in losses.values()), sum(update for _, update in losses.values()))
    return MergeReport({path: share(*loss) for path, loss in losses.items()}, whole, " and ".join(sorted(kinds)))


def unmerge(model: nn.Module) -> None:
    """Put the kept layers back: bit-exact in every dtype. Raises ``StateError`` when nothing is merged."""
    adapters = adapters_of(model)
    with LOCK, Change() as change:
        adapters.refuse_while_mixing()
        if not adapters.merged:
            raise StateError("no adapter is merged, so there is nothing to unmerge; call merge first")
        for slot in adapters.slots.values():
            change.put(slot, "merged", None)
        change.put(adapters, "merged", ())
        adapters.refresh(change)
        adapters.settle(change)
