"""A file's tensors into adapters: nothing is copied before every name, shape and dtype has been compared, and then all or nothing.

Next file: ``peft/peft_model.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.slot import Value
from minilora.store.adapter_files import Stored
from minilora.store.save import laid_out, tensors_of
from minilora.store.tables import brought_tables, carrier

__all__ = ["LoadReport", "fill"]

_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class LoadReport:
    """What loading left out: lists of tensor names as in the file, all empty unless ``strict=False``; and the keys of another program's
    config that mean nothing here."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]
    ignored_config_keys: list[str] = field(default_factory=list)


def fill(
    model: nn.Module,
    values: Mapping[str, Value],
    stored: Stored,
    strict: bool,
    fresh: bool = False,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Copy the file's tensors into adapters after comparing every name and shape; ``fresh`` ones are in no model yet.

    With ``ignore_mismatched_sizes`` a tensor of another shape is left out and told of, and not refused.
    """
    own, theirs = tensors_of(values), laid_out(values, stored.tensors, False)
    tables, not_ours, unlike = brought_tables(model, values, theirs, own, fresh, ignore_mismatched_sizes)
    tensors = {key: tensor for key, tensor in theirs.items() if key not in not_ours}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
    if strict and missing:
        raise CheckpointError(
            f"{stored.path}: {_listed(missing)} missing, which the config asks for on this model; wrong base model or config?"
        )
    if strict and extra:
        raise CheckpointError(
            f"{stored.path}: {_listed(extra)} unexpected on this model; wrong base model, or target_modules too short?"
        )
    if strict and wrong and not ignore_mismatched_sizes:
        found, wanted = list(stored.tensors[wrong[0]].shape), list(laid_out(values, own, True)[wrong[0]].shape)
        raise CheckpointError(
            f"{stored.path}: size mismatch: {wrong[0]} is {found}, config and model want {wanted}; wrong base "
            "model or r"
        )
    for key in sorted(own.keys() & tensors.keys()):
        kind = tensors[key].dtype
        if kind != own[key].dtype and kind not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{stored.path}: {key} is {kind}; wanted float32, float16 or bfloat16")
    fitting = sorted(own.keys() & tensors.keys() - set(wrong))
    _refuse_unequal_twins(own, tensors, fitting, stored.path)
    if fresh:
        for key in fitting:
            own[key].copy_(tensors[key])
        if tables and (adapter := carrier(values)) is not None:
            adapter.brings = tables
    else:
        bare = Bare(model)
        with LOCK, Change() as change:
            for name, tensor in tables.items():
                change.overwrite(bare.get_parameter(name), tensor)
            for key in fitting:
                change.overwrite(own[key], tensors[key])
    return LoadReport(missing, extra, sorted({*wrong, *unlike}))


def _refuse_unequal_twins(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], keys: list[str], path: Path
) -> None:
    """Two names of one tied tensor must bring the same values (a head sees the embedding's factor turned round)."""
    first: dict[int, str] = {}
    for key in keys:
        twin = first.setdefault(own[key].data_ptr(), key)
        turned = tensors[key].T if own[key].dim() == 2 and own[key].stride() != own[twin].stride() else tensors[key]
        if twin != key and own[key].numel() == own[twin].numel() and not torch.equal(tensors[twin], turned):
            raise CheckpointError(
                f"{path}: {key} differs from the embedding that this head is tied to; untie the model first"
            )


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more + (" is" if len(listed) == 1 else " are")
