"""What can be done with a model that carries adapters: switch, disable, delete, merge, unmerge, count.

Merging is the same for every variant and every base: ``with_weight(base, dense_weight(base) + sum of delta_weight())``, in fp32 and
rounded once, and it says how much of the update survived the rounding. The layer it replaces is kept, so unmerging puts the very same
bytes back. Next file: ``store/load.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.layers import QuantLinear, compute_dtype, dense_weight, is_quantized, with_weight
from minilora.lora.adapter import Adapter
from minilora.lora.bases import refuse_to_replace
from minilora.lora.copies import in_given_dtype
from minilora.lora.slots import Adapters, Slot, adapters_of, detach, own_parameters
from minilora.lora.tying import has_parted, refuse_shared, say_untied, share_again
from minilora.quant.config import QuantConfig
from minilora.quant.finite import is_finite

__all__ = [
    "MergeReport",
    "count_parameters",
    "delete_adapter",
    "disabled",
    "merge",
    "set_adapter",
    "unload",
    "unmerge",
]


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active, trainable ones; of several the updates are added.

    Raises:
        StateError: an unknown name, or adapters that cannot be added. Nothing has changed then.
    """
    if not isinstance(names, (str, Sequence)):
        raise StateError(f"set_adapter({names!r}): wanted a name, or a list of names")
    chosen = [names] if isinstance(names, str) else list(names)
    if not chosen:
        raise StateError("no adapter is named; name one, or use disable_adapter() for the bare model")
    adapters_of(model).activate(chosen)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter and its parameters; if it was the only active one, the first of the others becomes active.

    Raises:
        StateError: an unknown name, a merged adapter, or the only one (``unload`` takes that out).
    """
    adapters = adapters_of(model)
    adapters.check([name])
    adapters.refuse_while_mixing()
    if name in adapters.merged:
        raise StateError(f"adapter {name!r} is merged; unmerge first")
    if len(adapters.configs) == 1:
        raise StateError(f"adapter {name!r} is the only one; unload() gives back the plain model")
    left = [other for other in adapters.active if other != name]
    successor = left or sorted(other for other in adapters.configs if other != name)[:1]
    adapters.check_stack(successor, adapters.merged)
    adapters.forget(name)
    if not left:
        adapters.activate(successor)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare model inside the block, merged adapters taken out too; everything is as before after it."""
    with adapters_of(model).bare():
        yield


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
    update, and the report says how much. Adapters that are active and not named go on working on top.

    Raises:
        StateError: an unknown name, adapters are merged already, a layer shares its weight with one that would not change, an adapter
            holds NaN or infinity, or a merged weight overflows its dtype. Nothing has changed then, nor after any other failure.
    """
    adapters = adapters_of(model)
    chosen = tuple(adapters.active if names is None else [names] if isinstance(names, str) else names)
    adapters.check_set(chosen)
    if adapters.merged:
        raise StateError(f"adapters {list(adapters.merged)} are merged already; call unmerge first")
    if not chosen:
        raise StateError("no adapter is active, so there is nothing to merge; name one, or set_adapter first")
    adapters.check_stack([*adapters.active, *chosen], chosen)
    folded = {path: held for path, slot in adapters.slots.items() if (held := _adapters_at(slot, chosen))}
    _refuse_nonfinite(adapters, chosen)
    for path in folded:
        refuse_to_replace(path, adapters.slots[path].base)  # type: ignore[arg-type]
    layers: dict[str, nn.Module] = {}
    losses: dict[str, tuple[float, float]] = {}
    try:
        with adapters.bare():
            refuse_shared(model, adapters, folded)
        for path, adapters_here in folded.items():
            layers[path], losses[path] = _merged_layer(adapters.slots[path], adapters_here, requantize)
        share_again(adapters, layers)
        for path, layer in layers.items():
            adapters.slots[path].merged = layer
        adapters.merged = chosen
        adapters.show()
    except BaseException:
        for slot in adapters.slots.values():
            slot.merged = None
        adapters.merged = ()
        adapters.show()  # merging looked at each adapter alone, on its base
        raise
    return _report(layers, losses)


def _refuse_nonfinite(adapters: Adapters, names: Sequence[str]) -> None:
    for path, slot in adapters.slots.items():
        for name in names:
            values = own_parameters(slot.kept[name]) if name in slot.kept else ()
            if not all(map(is_finite, values)):
                raise StateError(
                    f"{path}: adapter {name!r} holds NaN or infinity, so it is not merged; load an earlier save of it"
                )


def _adapters_at(slot: Slot, names: Sequence[str]) -> list[Adapter]:
    return [value for name in names if isinstance(value := slot.kept.get(name), Adapter)]


def _merged_layer(slot: Slot, folded: Sequence[Adapter], requantize: bool) -> tuple[nn.Module, tuple[float, float]]:
    """A layer with the sum of the updates inside, and ``(|error|^2, |update|^2)``."""
    base: nn.Module = slot.base  # type: ignore[assignment]
    for adapter in folded:
        adapter.base_layer = base
    with torch.no_grad():
        before = dense_weight(base)
        update = torch.stack([adapter.delta_weight() for adapter in folded]).sum(0)
        merged = (before.float() + update).to(compute_dtype(base))
        shifts = [shift for adapter in folded if (shift := adapter.delta_bias()) is not None]
        bias = _moved_bias(base, shifts) if shifts else None
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
        layer = QuantLinear.from_linear(layer, QuantConfig(base.book, base.blocksize, base.double_quant), slot.path)
    error = (dense_weight(layer).float() - before.float()) - update
    return layer, (float(error.square().sum()), float(update.square().sum()))


def _moved_bias(base: nn.Module, shifts: Sequence[Tensor]) -> Tensor:
    shift = torch.stack(list(shifts)).sum(0)
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    return shift.to(compute_dtype(base)) if bias is None else (bias.float() + shift).to(bias.dtype)


def _report(layers: dict[str, nn.Module], losses: dict[str, tuple[float, float]]) -> MergeReport:
    def share(error: float, update: float) -> float:
        return 1.0 if update == 0 else max(0.0, 1 - (error / update) ** 0.5)

    kinds = {
        layer.format if is_quantized(layer) else str(layer.weight.dtype).removeprefix("torch.")
        for layer in layers.values()
    }
    whole = share(sum(error for error, _ in losses.values()), sum(update for _, update in losses.values()))
    return MergeReport({path: share(*loss) for path, loss in losses.items()}, whole, " and ".join(sorted(kinds)))


def unmerge(model: nn.Module) -> None:
    """Put the kept layers back: bit-exact in every dtype. Raises ``StateError`` when nothing is merged."""
    adapters = adapters_of(model)
    if not adapters.merged:
        raise StateError("no adapter is merged, so there is nothing to unmerge; call merge first")
    for slot in adapters.slots.values():
        slot.merged = None
    adapters.merged = ()
    adapters.show()


def unload(model: nn.Module, keep_merged: bool = False) -> nn.Module:
    """Take every adapter out and forget them; with ``keep_merged`` what is merged (and trained copies) stays in place."""
    adapters = adapters_of(model)
    adapters.refuse_while_mixing()
    # A merged layer holds its update; copies and biases of merged adapters simply stay in their slots.
    adapters.active = adapters.merged = adapters.merged if keep_merged else ()
    adapters.show()
    if has_parted(model, adapters, adapters.merged):
        say_untied(model)
    for slot in adapters.slots.values():  # what trained whole stays, in the dtype that the model has
        for value in (slot.kept[name] for name in adapters.merged if name in slot.kept):
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(slot.base.dtype)  # type: ignore[arg-type]
            else:
                in_given_dtype(value)
    detach(model)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` by PEFT's rule: every parameter once, a packed weight as the weights it stands for, scales not at all."""
    adapters = adapters_of(model)
    kept = [value for slot in adapters.slots.values() for value in slot.kept.values()]
    shown = {id(slot.base): getattr(slot.parent, slot.attr) for slot in adapters.slots.values()}
    sizes: dict[int, tuple[int, bool]] = {}
    with adapters.bare():
        for root in [model, *(value for value in kept if isinstance(value, nn.Module))]:
            for module in root.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    # A trained bias stands in the place of the base's, and is counted once, as in PEFT, which trains that one.
                    trains = shown.get(id(parameter), parameter).requires_grad
                    sizes[id(parameter)] = (_logical_size(module, name, parameter), trains)
    return sum(size for size, trains in sizes.values() if trains), sum(size for size, _ in sizes.values())


def _logical_size(module: nn.Module, name: str, parameter: Tensor) -> int:
    if is_quantized(module) and name != "bias":
        return module.out_features * module.in_features if name == "weight" else 0
    return parameter.numel()
