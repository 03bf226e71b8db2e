"""Hot swap under PEFT's names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from minilora.errors import StateError, warn
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.factors import widened
from minilora.lora.layer import LoRALinear
from minilora.lora.slots import adapters_of, has_adapters
from minilora.many import hotswap
from minilora.peft.hub import folder_of
from minilora.peft.inner import innermost

__all__ = ["hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **where: Any,
) -> None:
    """Overwrite an adapter in place with the one in a folder or on the Hub; a compiled model stays compiled."""
    allowed = {name: where.pop(name) for name in ("expect_sha256", "allow_other_base") if name in where}
    hotswap.hotswap_adapter(innermost(model), folder_of(model_name_or_path, where), adapter_name, **allowed)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors named as in a file, and their config."""
    hotswap.hotswap_tensors(innermost(model), state_dict, config, adapter_name)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room for adapters of larger rank before ``torch.compile``: A and B are filled up with zeros to ``target_rank``.

    The scaling of a swapped adapter is folded into its B, so no number that a compiler has seen changes.

    Args:
        target_rank: the largest rank that will come; None leaves the ranks.
        config: one config, or adapter name to config, whose ranks are set to ``target_rank``.
        check_compiled: "error", "warn" or "ignore" if the model is compiled already.

    Raises:
        StateError: the model is compiled already, has no adapter layer, or has one of a larger rank. Nothing has changed then.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise StateError(f"check_compiled={check_compiled!r}: wanted 'error', 'warn' or 'ignore'")
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if compiled and check_compiled != "ignore":
        if check_compiled == "error":
            raise StateError(
                "Call prepare_model_for_compiled_hotswap *before* compiling the model, which is compiled already"
            )
        warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled; it will be compiled again, so call it "
            "before torch.compile"
        )
    inner = innermost(model)
    if not has_adapters(inner):
        raise StateError("No adapter layers found on the model; load the first adapter before preparing it")
    layers = [v for slot in adapters_of(inner).slots.values() for v in slot.kept.values() if isinstance(v, LoRALinear)]
    if target_rank is not None:
        if larger := [layer.r for layer in layers if layer.r > target_rank]:
            raise StateError(
                f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({larger[0]}); give the "
                "largest rank of all"
            )
        for layer in layers:
            groups = getattr(layer.innermost, "groups", 1)
            if target_rank % groups:
                kind = type(layer.innermost).__name__
                raise StateError(
                    f"Trying to pad a {kind} LoRA adapter with groups={groups} to target rank {target_rank}, but the target rank is not "
                    f"divisible by {groups}. Please choose a target rank that is divisible by {groups}."
                )
        for layer in layers:
            _widen(layer, target_rank)
        for name in adapters_of(inner).configs:
            _say(inner, name, target_rank)
        for each in config.values() if isinstance(config, dict) else [config] if config is not None else []:
            if not each.in_use:  # the model's own say it already
                each.r = target_rank
                each.rank_pattern = dict.fromkeys(each.rank_pattern, target_rank)


def _say(model: nn.Module, name: str, rank: int) -> None:
    """The adapter's config says the new rank, and the ``lora_alpha`` that gives each layer the factor that it has."""
    adapters = adapters_of(model)
    config = adapters.configs[name]
    by_rank = rank**0.5 if config.use_rslora else rank
    alphas = {path: v.scaling * by_rank for path, v in adapters.named(name).items() if isinstance(v, LoRALinear)}
    usual = max(alphas.values(), key=list(alphas.values()).count)
    others = {path: alpha for path, alpha in alphas.items() if alpha != usual}
    ranks = dict.fromkeys(config.rank_pattern, rank)
    new = dataclasses.replace(config, r=rank, lora_alpha=usual, rank_pattern=ranks, alpha_pattern=others)
    with LOCK, Change() as change:
        change.item(adapters.configs, name, new.for_use())


def _widen(layer: LoRALinear, rank: int) -> None:
    """The same update at this rank; the factor stays."""
    layer.lora_A.data, layer.lora_B.data = widened(layer.lora_A.data, layer.lora_B.data, rank, layer.on == "experts")
    layer.r = rank
