"""Exchange the weights of an adapter in place: the same parameters, so a compiled model need not be compiled again.

A new scaling is folded into B, and a smaller rank is filled up with zeros, so that nothing that a compiler has seen changes.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from minilora.checkpoint import WEIGHTS_FILE, load_values, read_adapter
from minilora.errors import CheckpointError
from minilora.lora import LoRALinear
from minilora.slots import adapters_of

__all__ = ["hotswap_adapter"]


@torch.no_grad()
def hotswap_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Overwrite adapter ``adapter_name`` with the one in ``folder``; layers that the file does not adapt get B = 0.

    Raises:
        CheckpointError: the folder has another kind of adapter, layers that the present one lacks, or a larger rank; the present adapter
            is then as it was. StateError: there is no such adapter.
    """
    adapters = adapters_of(model)
    present = adapters.named(adapter_name)
    stored = read_adapter(folder)
    with torch.random.fork_rng(devices=[]):  # building draws start values that are overwritten at once
        incoming = load_values(model, stored, "incoming-" + adapter_name[:48])
    where = os.path.join(folder, WEIGHTS_FILE)
    for path, value in incoming.items():
        old = present.get(path)
        if type(old) is not type(value) or not isinstance(old, LoRALinear) or not isinstance(value, LoRALinear):
            raise CheckpointError(f"{where}: adapts {path} as {type(value).__name__}, adapter {adapter_name!r} has {type(old).__name__}; "
                                  "load it with load_adapter instead")  # fmt: skip
        if value.r > old.r:
            raise CheckpointError(
                f"{where}: {path} has rank {value.r}, the present adapter {old.r}; start from the largest rank"
            )
        if (value.lora_bias is None) != (old.lora_bias is None):
            raise CheckpointError(f"{where}: {path} differs in lora_bias; load it with load_adapter instead")
    for path, old in present.items():
        new = incoming.get(path)
        if isinstance(old, LoRALinear):
            _overwrite(old, new if isinstance(new, LoRALinear) else None)


def _overwrite(old: LoRALinear, new: LoRALinear | None) -> None:
    """Every saved tensor of ``old`` from ``new``, B and its bias in ``old``'s scaling."""
    old.lora_B.zero_()
    if new is None:
        return
    ratio = new.scaling / old.scaling
    old.lora_A.zero_()[: new.r] = new.lora_A
    old.lora_B[:, : new.r] = new.lora_B * ratio
    if old.lora_bias is not None and new.lora_bias is not None:
        old.lora_bias.copy_(new.lora_bias * ratio)
    for name in old.file_names.keys() - {"lora_A", "lora_B", "lora_bias"}:
        getattr(old, name).copy_(getattr(new, name))
