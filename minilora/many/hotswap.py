"""Exchange the weights of an adapter in place: the same parameters, so a compiled model need not be compiled again.

A new scaling is folded into B, and a smaller rank is filled up with zeros, so that nothing that a compiler has seen changes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.factors import widened
from minilora.lora.layer import LoRALinear
from minilora.lora.slots import adapters_of
from minilora.lora.variants.residual import ResidualLoRA
from minilora.store.adapter_files import WEIGHTS_FILE, Stored, read_adapter
from minilora.store.copies import as_meant
from minilora.store.load import load_values, refuse_other_base
from minilora.store.old_experts import as_today

__all__ = ["hotswap_adapter", "hotswap_tensors"]


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
) -> None:
    """Overwrite adapter ``adapter_name`` with the one in ``folder``; layers that the file does not adapt get B = 0.

    ``expect_sha256`` and ``allow_other_base`` are as for ``load_adapter``.

    Raises:
        CheckpointError: the folder has another kind of adapter, layers that the present one lacks, or a larger rank; the present adapter
            is then as it was. StateError: there is no such adapter, or it is merged.
    """
    _refuse_what_stays(model, adapter_name, os.path.join(folder, WEIGHTS_FILE))
    stored = read_adapter(folder, expect_sha256=expect_sha256)
    refuse_other_base(model, stored, allow_other_base)
    _swap(model, stored, adapter_name)


@torch.no_grad()
def hotswap_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], config: LoraConfig, adapter_name: str = "default"
) -> None:
    """The same from tensors named as in a file, and the config that they were saved with. Raises as ``hotswap_adapter``."""
    _refuse_what_stays(model, adapter_name, "state dict")
    config = config.for_use()
    _swap(model, Stored(config, dict(tensors), config.variant, Path("state dict")), adapter_name)


def _refuse_what_stays(model: nn.Module, adapter_name: str, where: str) -> None:
    """Raise for an adapter that cannot be overwritten, before a file is read."""
    adapters = adapters_of(model)
    present = adapters.named(adapter_name)
    adapters.refuse_merged(adapter_name)
    for path, old in present.items():
        if not isinstance(old, LoRALinear):
            kind = type(old).__name__
            raise CheckpointError(
                f"{where}: adapter {adapter_name!r} has a {kind} at {path}, which cannot be exchanged; use load_adapter"
            )


def _swap(model: nn.Module, stored: Stored, adapter_name: str) -> None:
    adapters, stored = adapters_of(model), as_meant(as_today(stored, Bare(model)), Bare(model))
    present, where = adapters.named(adapter_name), stored.path
    with torch.random.fork_rng(devices=[]):  # building draws start values that are overwritten at once
        incoming, _ = load_values(model, stored, "incoming-" + adapter_name[:48])
    for path, value in incoming.items():
        here = present.get(path)
        if type(here) is not type(value) or not isinstance(here, LoRALinear) or not isinstance(value, LoRALinear):
            kinds = f"{type(value).__name__}, adapter {adapter_name!r} has {type(here).__name__}"
            raise CheckpointError(f"{where}: adapts {path} as {kinds}; load it with load_adapter instead")
        if getattr(value, "tokens", None) != getattr(here, "tokens", None):
            raise CheckpointError(
                f"{where}: {path} begins at other alora_invocation_tokens than the present adapter; use load_adapter"
            )
        if value.r > here.r:
            raise CheckpointError(
                f"{where}: {path} has rank {value.r}, the present adapter {here.r}; start from the largest rank"
            )
        if (value.lora_bias is None) != (here.lora_bias is None):
            raise CheckpointError(f"{where}: {path} differs in lora_bias; load it with load_adapter instead")
    for path, here in present.items():
        new = incoming.get(path)
        if isinstance(here, ResidualLoRA) and not (
            isinstance(new, ResidualLoRA) and (new.r, new.scaling) == (here.r, here.scaling)
        ):
            raise CheckpointError(
                f"{where}: {path} starts from another part of the weight than the present adapter; use load_adapter"
            )
    with LOCK, Change() as change:
        adapters.check([adapter_name])
        for path, old in present.items():
            assert isinstance(old, LoRALinear)  # checked above
            new = incoming.get(path)
            for name, values in _in_scaling_of(old, new if isinstance(new, LoRALinear) else None).items():
                change.overwrite(getattr(old, name), values)


def _in_scaling_of(old: LoRALinear, new: LoRALinear | None) -> dict[str, Tensor]:
    """What every saved tensor of ``old`` becomes: ``new``'s, B and its bias in ``old``'s scaling; without ``new`` no update at all."""
    again = copy.deepcopy(old, {id(old.base_layer): old.base_layer})
    again.reset()
    if new is not None:
        ratio = new.scaling / old.scaling
        A, B = widened(new.lora_A, new.lora_B * ratio, old.r, old.on == "experts")
        again.lora_A.copy_(A)
        again.lora_B.copy_(B)
        if again.lora_bias is not None and new.lora_bias is not None:
            again.lora_bias.copy_(new.lora_bias * ratio)
        for name in old.file_names.keys() - {"lora_A", "lora_B", "lora_bias"}:
            getattr(again, name).copy_(getattr(new, name))
    return {name: tensor for name in old.file_names if (tensor := getattr(again, name)) is not None}
