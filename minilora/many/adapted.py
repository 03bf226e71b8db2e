"""What can be done with a model that carries adapters: switch, disable, delete, take out, count.

Next file: ``many/merging.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from minilora.errors import StateError, nearest
from minilora.linear.layers import dense_shape, in_out_features, is_foreign, is_quantized, stored_weight
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.copies import in_given_dtype
from minilora.lora.slot import check_stack, own_parameters
from minilora.lora.slots import adapters_of, detach
from minilora.lora.tying import has_parted, say_untied

__all__ = [
    "count_parameters",
    "delete_adapter",
    "disabled",
    "set_adapter",
    "showing",
    "unload",
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
    with LOCK, Change() as change:
        adapters_of(model).activate(change, chosen)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter and its parameters; if it was the only active one, the first of the others becomes active.

    Raises:
        StateError: an unknown name, or a merged adapter.
    """
    adapters = adapters_of(model)
    with LOCK, Change() as change:
        if not isinstance(name, str) or name not in adapters.configs:
            raise StateError(f"Adapter {name} does not exist; there are {nearest(str(name), adapters.configs)}")
        adapters.refuse_while_mixing()
        if name in adapters.merged:
            raise StateError(f"Cannot delete adapter(s) [{name!r}] while they are merged. Please unmerge them first.")
        active = adapters.active
        left = tuple(other for other in active if other != name)
        others = sorted(other for other in adapters.configs if other != name)
        successor = left or tuple(others[: name in active])
        check_stack(adapters.slots, successor, adapters.merged)
        adapters.forget(change, name)
        if active and not left:
            adapters.activate(change, successor)
        elif left != active:
            change.put(adapters, "chosen", left)
            adapters.settle(change)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """The bare model inside the block, merged adapters taken out too; everything is as before after it.

    It is the model that changes, for every thread. A thread that wants the bare model for itself asks for it by call:
    ``batch_adapters(model, ["__base__"] * rows)``.
    """
    return adapters_of(model).bare()


@contextmanager
def showing(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """These adapters inside the block, and after it those from before; which parameters train does not change.

    It is the model that changes, for every thread. Raises ``StateError`` as ``set_adapter``, and while adapters are merged.
    """
    adapters, before = adapters_of(model), adapters_of(model).active
    adapters.check_set(names)
    if adapters.merged:
        raise StateError(f"adapters {list(adapters.merged)} are merged and would stay in the weights; unmerge first")
    check_stack(adapters.slots, names, ())
    try:
        try:  # twice, so that an interrupt on the way out cannot leave the model so
            _show(model, names)
            yield
        finally:
            _show(model, before)
    finally:
        _show(model, before)


def _show(model: nn.Module, names: Sequence[str]) -> None:
    adapters = adapters_of(model)
    if adapters.chosen == tuple(names):
        return
    with LOCK, Change() as change:
        adapters.refuse_while_mixing()
        change.put(adapters, "chosen", tuple(names))
        adapters.settle(change)


def unload(model: nn.Module, keep_merged: bool = False) -> nn.Module:
    """Take every adapter out and forget them; with ``keep_merged`` what is merged (and trained copies) stays in place."""
    with LOCK, Change() as change:
        take_out(change, model, keep_merged)
    return model


def take_out(change: Change, model: nn.Module, keep_merged: bool) -> None:
    """``unload`` as a part of a change. Raises ``StateError`` while a batch mixes adapters."""
    adapters = adapters_of(model)
    adapters.refuse_while_mixing()
    # A merged layer holds its update; copies and biases of merged adapters simply stay in their slots.
    merged = adapters.merged if keep_merged else ()
    change.put(adapters, "chosen", merged)
    change.put(adapters, "merged", merged)
    change.put(adapters, "faces", None)
    for parent, attr, module in adapters.doors.values():
        change.item(parent._modules, attr, module)
    change.put(adapters, "doors", {})
    change.put(adapters, "odd", ())
    for slot in adapters.slots.values():
        for name, plain in (("face", None), ("only", None), ("off", False)):
            change.put(slot, name, plain)
    adapters.settle(change)
    if has_parted(Bare(model), adapters, merged):
        say_untied(change, model)
    for slot in adapters.slots.values():  # what trained whole stays, in the dtype that the model has
        for value in (slot.kept[name] for name in merged if name in slot.kept):
            if isinstance(value, Adapter):
                continue
            for parameter in own_parameters(value):
                change.keep(parameter, "data")
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(slot.base.dtype)  # type: ignore[arg-type]
            else:
                change.classes(value.modules())
                in_given_dtype(value)
    detach(change, model)
    if merged and any(isinstance(slot.base, nn.Module) and is_foreign(slot.base) for slot in adapters.slots.values()):
        say_dense(change, model)  # its layers have their own names again


def say_dense(change: Change, model: nn.Module) -> None:
    """Say in ``model.config`` which layers another library's quantizer shall leave alone from now on, or that there is no quantizer.

    Saved and loaded, the model would otherwise be looked for packed weights where merged, dense ones are.
    """
    said = getattr(getattr(model, "config", None), "quantization_config", None)
    if said is None:
        return
    if any(is_foreign(module) for module in model.modules()):
        dense = [
            path for path, module in model.named_modules() if isinstance(module, nn.Linear) and not is_foreign(module)
        ]
        if hasattr(said, "llm_int8_skip_modules"):
            change.put(said, "llm_int8_skip_modules", dense)
        return
    change.drop(model.config.__dict__, "quantization_config")
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        if name in model.__dict__:
            change.drop(model.__dict__, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, name, False):
            change.put(model, name, False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` by PEFT's rule: every parameter once, a packed weight as the weights it stands for, scales not at all."""
    adapters, bare = adapters_of(model), Bare(model)
    slots = list(adapters.slots.values())
    # A trained bias stands in the place of the base's, and is counted once, as in PEFT, which trains that one.
    biases = {
        id(slot.base): any(slot.kept[name].requires_grad for name in adapters.active if name in slot.kept)
        for slot in slots
        if isinstance(slot.base, nn.Parameter)
    }
    sizes: dict[int, tuple[int, bool]] = {}
    for module in bare.modules():
        for name, parameter in bare.parameters_of(module):
            trains = biases.get(id(parameter), parameter.requires_grad)
            sizes[id(parameter)] = (_logical_size(module, name, parameter), trains)
    for value in (value for slot in slots for value in list(slot.kept.values())):
        if isinstance(value, nn.Module):
            for path, parameter in value.named_parameters():
                if not (isinstance(value, Adapter) and path.startswith("base_layer.")):
                    sizes[id(parameter)] = (parameter.numel(), parameter.requires_grad)
    return sum(size for size, trains in sizes.values() if trains), sum(size for size, _ in sizes.values())


def _logical_size(module: nn.Module, name: str, parameter: Tensor) -> int:
    if is_quantized(module) and name != "bias":
        return math.prod(dense_shape(module)) if name == "weight" else 0
    if is_foreign(module) and parameter is stored_weight(module):
        return math.prod(in_out_features(module))
    return parameter.numel()
