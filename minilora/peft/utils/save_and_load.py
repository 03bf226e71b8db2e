"""State dicts of adapters and of the bare model, under PEFT's names."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, StateError
from minilora.files.hub import cached
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.slots import adapters_of
from minilora.peft.experts import experts_paths
from minilora.peft.face import Face
from minilora.peft.hub import folder_of, name_of
from minilora.peft.inner import gathered, innermost
from minilora.peft.meta import made_real
from minilora.peft.notes import say_left_out
from minilora.store.adapter_files import PROJECTIONS, read_adapter
from minilora.store.load import LoadReport, adapter_state_dict, fill_adapter
from minilora.store.projections import projections_in
from minilora.store.save import laid_out
from minilora.store.tables import saved_tables

__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]

IncompatibleKeys = namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])
_PREFIX = "base_model.model."


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors under the names that its file has.

    Args:
        state_dict: the whole model's (as FSDP gathers it): the tensors are taken from there instead of from the model.
        unwrap_compiled: PEFT's; what ``torch.compile``, DDP or FSDP wrapped is always looked into.

    Where the model has PEFT's methods (``get_peft_model``) names begin with "base_model.model.", after ``inject`` they do not, as in PEFT.
    """
    inner = innermost(model)
    adapters_of(inner).check([adapter_name])
    base = adapters_of(inner).configs[adapter_name].base_model_name_or_path or name_of(inner)
    with gathered(model) as copied:
        own = laid_out(adapters_of(inner).named(adapter_name), adapter_state_dict(inner, adapter_name), True)
        if state_dict is not None:
            own = _all_from(inner, adapter_name, list(own), state_dict)
        own |= projections_in(adapters_of(inner).named(adapter_name))
        own |= saved_tables(inner, adapter_name, save_embedding_layers, cached(base, "config.json"))
        own = {key: copied(value) for key, value in own.items()}
    return own if isinstance(inner, Face) else {key.removeprefix(_PREFIX): value for key, value in own.items()}


def taken_from(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter that a whole model's state dict has, under their names in a file; none where it has none of them.

    Raises:
        CheckpointError: it has some, and lacks others.
    """
    keys = list(adapter_state_dict(model, adapter_name)) if state_dict else []
    shown = _in_tree(model, adapter_name)
    if not any(name in state_dict for key in keys for name in _names(_shown(key, shown), adapter_name)):
        return {}
    return _all_from(model, adapter_name, keys, state_dict)


def _in_tree(model: nn.Module, adapter_name: str) -> dict[str, str]:
    return {f"{_PREFIX}{path}.": f"{_PREFIX}{now}." for path, now in experts_paths(model, adapter_name).items()}


def _all_from(
    model: nn.Module, adapter_name: str, keys: list[str], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    shown = _in_tree(model, adapter_name)
    return {key: _found(_shown(key, shown), adapter_name, state_dict) for key in keys}


def _shown(key: str, paths: Mapping[str, str]) -> str:
    """A name in a file as PEFT's tree has it: one projection of experts may be inside of another adapter's."""
    owner = key.partition("lora_")[0]
    return paths.get(owner, owner) + key[len(owner) :]


def _found(key: str, adapter_name: str, state_dict: Mapping[str, Tensor]) -> Tensor:
    """A tensor of an adapter's file in the state dict of a whole model, where its name stands before the last part or behind it."""
    for name in _names(key, adapter_name):
        if name in state_dict:
            return state_dict[name]
    raise CheckpointError(
        f"state_dict has no {_names(key, adapter_name)[1]!r}, which adapter {adapter_name!r} has; give the whole model's"
    )


def _names(key: str, adapter_name: str) -> tuple[str, ...]:
    """What a whole model's state dict may call a tensor of an adapter's file."""
    head, _, last = key.rpartition(".")
    names = (
        key,
        f"{head}.{adapter_name}.{last}",
        f"{key}.{adapter_name}",
        f"{head}.modules_to_save.{adapter_name}.{last}",
    )
    return (*names, *(name.removeprefix(_PREFIX) for name in names))


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Copy tensors into an adapter that the model has.

    Args:
        ignore_mismatched_sizes: leave out what has another shape, with a warning.
        strict: what does not fit raises ``CheckpointError``; False loads the rest, and the result says what was left out.
        low_cpu_mem_usage: PEFT's; an adapter that was made without values (on the meta device) gets its memory here.
    """
    known = (_PREFIX, *PROJECTIONS)
    tensors = {key if key.startswith(known) else _PREFIX + key: value for key, value in peft_model_state_dict.items()}
    with LOCK, Change() as change, gathered(model, write=True):
        made_real(change, innermost(model), adapter_name)
        report = fill_adapter(innermost(model), tensors, adapter_name, strict, ignore_mismatched_sizes)
    say_left_out(innermost(model), report if ignore_mismatched_sizes else None)
    return report


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | None = None, key_mapping: dict[str, str] | None = None, **where: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter folder, or of an id on the Hub. Raises ``CheckpointError`` as ``minilora.load_adapter``."""
    from minilora.store.load import renamed

    stored = read_adapter(folder_of(model_id, where))
    tensors = {renamed(key, key_mapping or {}): tensor for key, tensor in stored.tensors.items()}
    return {key: tensor if device is None else tensor.to(device) for key, tensor in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Any]:
    """The bare model's state dict, under the names that it had before it got adapters; the tensors are the model's."""
    found: dict[str, Any] = {}
    for path, module in Bare(innermost(model)).named_modules(remove_duplicate=False):
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, f"{path}." if path else "", keep_vars=False)
        found.update(own)
    return found


@torch.no_grad()
def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Copy a state dict of the bare model into a model with adapters, which stay as they are.

    Returns:
        ``(missing_keys, unexpected_keys)``.

    Raises:
        CheckpointError: ``strict`` and names differ, or a shape is another. StateError: an adapter is merged. Nothing has changed then.
    """
    if merged := adapters_of(innermost(model)).merged:
        raise StateError(
            f"adapters {list(merged)} are merged, and their weights would stay as they are; unmerge_adapter() first"
        )
    own = get_base_model_state_dict(model)
    missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if strict and (missing or extra):
        what = f"Missing key {missing[0]}" if missing else f"Unexpected key {extra[0]}"
        raise CheckpointError(
            f"state_dict: {what} ({len(missing)} missing, {len(extra)} unexpected); set strict=False to load the rest"
        )
    for key in own.keys() & state_dict.keys():
        if isinstance(own[key], Tensor) and own[key].shape != state_dict[key].shape:
            found, wanted = list(state_dict[key].shape), list(own[key].shape)
            raise CheckpointError(f"state_dict: {key} is {found}, the model wants {wanted}; another base model?")
    with LOCK, Change() as change:
        for key in own.keys() & state_dict.keys():
            if isinstance(own[key], Tensor):
                change.overwrite(own[key], state_dict[key].to(own[key].device, own[key].dtype))
    return IncompatibleKeys(missing, extra)
