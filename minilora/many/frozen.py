"""Frozen copies of adapters: what a model shows now, kept beside it while it trains on. Next file: ``hf/began.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.config import ABOUT_THE_FILE
from minilora.lora.inject import build, place
from minilora.lora.slot import Value, own_parameters
from minilora.lora.slots import adapters_of
from minilora.lora.variants.vera import VeRALinear

__all__ = ["REF", "began_with", "changes_nothing", "copy_values", "frozen_copy", "is_copy"]

REF = "ref"  # what TRL calls it


def began_with(model: nn.Module) -> dict[str, str]:
    """The adapters that show for ever what ``model`` shows now, each to the one that it stands for; none for the bare model.

    A frozen adapter is its own. One that trains is left out if it changes nothing, and copied (``frozen_copy``) otherwise; a copy that is
    there from before is taken if it is still equal (``is_copy``).

    Raises:
        StateError: adapters are merged, or another adapter has the name of a copy. Nothing has changed then.
    """
    adapters = adapters_of(model)
    if adapters.merged:
        raise StateError(
            f"adapters {list(adapters.merged)} are merged, and would be so in the reference; unmerge first"
        )
    shown = {name: _trains(adapters.named(name)) for name in adapters.active}
    copied = {
        name: REF if name == "default" else f"{REF}_{name}"
        for name, trains in shown.items()
        if trains and not changes_nothing(model, name)
    }
    for name, copy in copied.items():
        if copy in adapters.configs and not is_copy(model, name, copy):
            raise StateError(
                f"adapter {copy!r} is there already and is not what {name!r} is now: another run began from it; delete_adapter({copy!r}) "
                "first, for a reference to the model as it is now, or give the trainer the ref_model= of that run"
            )
    for name, copy in copied.items():
        if copy not in adapters.configs:
            frozen_copy(model, name, copy)
    return {copied.get(name, name): name for name, trains in shown.items() if not trains or name in copied}


def _trains(values: Mapping[str, Value]) -> bool:
    return any(parameter.requires_grad for value in values.values() for parameter in own_parameters(value))


def frozen_copy(model: nn.Module, name: str, new: str) -> None:
    """Add adapter ``new``, equal to ``name``, frozen, without dropout and not active."""
    adapters = adapters_of(model)
    config = dataclasses.replace(adapters.configs[name], lora_dropout=0.0, inference_mode=True)
    kind = adapters.variants[name]
    values = build(model, config, new, kind)
    place(model, config, new, values, kind, activate=False, trainable=False)
    copy_values(model, name, new)


@torch.no_grad()
def is_copy(model: nn.Module, name: str, new: str) -> bool:
    """Whether adapter ``new`` is what ``frozen_copy`` would make of ``name``: the same config and numbers, frozen, and not active."""
    adapters = adapters_of(model)
    own, config = adapters.configs[name], adapters.configs[new]
    said = {field: getattr(config, field) for field in ABOUT_THE_FILE}
    source, copied = adapters.named(name), adapters.named(new)
    return (
        new not in adapters.active
        and not _trains(copied)
        and adapters.variants[name] == adapters.variants[new]
        and config == dataclasses.replace(own, lora_dropout=0.0, **said)
        and source.keys() == copied.keys()
        and all(_equal(source[path], value) for path, value in copied.items())
    )


def _equal(one: Value, other: Value) -> bool:
    parameters, buffers = (_parameters(one), _parameters(other)), (_buffers(one), _buffers(other))
    return (
        len(parameters[0]) == len(parameters[1])
        and all(map(torch.equal, *parameters))
        and buffers[0].keys() == buffers[1].keys()
        and all(torch.equal(held, buffers[1][key]) for key, held in buffers[0].items())
    )


@torch.no_grad()
def copy_values(model: nn.Module, name: str, new: str) -> None:
    """The values of adapter ``name``, and their dtypes, into its frozen copy ``new``."""
    source, copied = adapters_of(model).named(name), adapters_of(model).named(new)
    for path, value in copied.items():
        for own, theirs in zip(_parameters(value), _parameters(source[path]), strict=True):
            own.data = theirs.detach().clone()
        if isinstance(value, VeRALinear) and source[path].projections is not None:  # type: ignore[union-attr]
            value.take(source[path].projections)  # type: ignore[union-attr, arg-type]
        if isinstance(value, nn.Module):
            own_buffers, buffers = _buffers(value), _buffers(source[path])
            for key, buffer in own_buffers.items():
                buffer.copy_(buffers[key])


def _buffers(value: Value) -> dict[str, Tensor]:
    """What an adapter or a copy keeps beside its parameters: the start that it is measured from, factors that never train."""
    if isinstance(value, nn.Parameter):
        return {}
    return {name: held for name, held in value.named_buffers() if not name.startswith("base_layer.")}


def _parameters(value: Value) -> list[nn.Parameter]:
    """All that an adapter holds itself, what never trains too."""
    fixed = [value.get_parameter(name) for name in sorted(value.fixed)] if isinstance(value, Adapter) else []
    return [*own_parameters(value), *fixed]


@torch.no_grad()
def changes_nothing(model: nn.Module, name: str) -> bool:
    """Whether adapter ``name`` leaves every weight as the base has it, by its numbers; False where it cannot be told."""
    bare = Bare(model)
    for path, value in adapters_of(model).named(name).items():
        if isinstance(value, Adapter):
            if not _is_zero(value):
                return False
        elif isinstance(value, nn.Parameter):
            if not torch.equal(value, bare.get_parameter(path).to(value.dtype)):
                return False
        else:
            base = dict(bare.get_submodule(path).state_dict())
            if any(not torch.equal(tensor, base[key].to(tensor.dtype)) for key, tensor in value.state_dict().items()):
                return False
    return True


def _is_zero(value: Adapter) -> bool:
    try:
        factors, shift = value.as_lora(), value.delta_bias()
    except StateError:
        return False
    return (shift is None or not shift.any()) and any(not factor.any() for factor in factors)
