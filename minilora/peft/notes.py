"""What PEFT's users are told when an adapter is made, in PEFT's words where these are true here. Next file: ``peft/peft_model.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from minilora.errors import warn
from minilora.lora.bare import Bare
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import Value
from minilora.lora.tying import holders
from minilora.peft.wrappers import is_rows
from minilora.store.fill import LoadReport

__all__ = ["PeftWarning", "say_changed_base", "say_left_out", "say_new", "say_renamed"]


class PeftWarning(UserWarning):
    """Base of PEFT's own warnings; most of minilora's are plain ``UserWarning``."""


_CHANGES_BASE = {
    "pissa": "PiSSA",
    "corda": "CorDA",
    "olora": "OLoRA",
}  # in PEFT, where these are looked for in this order


def say_new(model: nn.Module, config: LoraConfig, values: Mapping[str, Value]) -> None:
    """Warn of what a new adapter that is in no model yet may not be meant to do."""
    _say_tying(model, config, values)
    odd = {type(v.innermost).__name__ for v in values.values() if isinstance(v, LoRALinear) and _moves_no_bias(v)}
    for kind in sorted(odd):
        warn(
            f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias; merging gives it one, which no checkpoint of "
            "the base model can take",
            PeftWarning,
        )


def _moves_no_bias(value: LoRALinear) -> bool:
    return value.lora_bias is not None and value.innermost.bias is None


def _say_tying(model: nn.Module, config: LoraConfig, values: Mapping[str, Value]) -> None:
    tied = _tied(Bare(model))
    touched = [path for path in values if path in tied]
    if config.ensure_weight_tying and not tied:
        warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model")
        if config.trainable_token_indices is not None:
            warn("ensure_weight_tying=True but the model does not have tied weights; each layer trains its own rows")
    elif config.ensure_weight_tying and not touched:
        warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or `target_modules`"
        )
    elif not config.ensure_weight_tying and (parted := [path for path in touched if not is_rows(values[path])]):
        warn(
            f"{parted[0]} shares its weight with another layer, and is in the adapter, but `ensure_weight_tying` is not set to True: the "
            "two part; set it to change them alike, or minilora.untie(model) before merging"
        )


def _tied(bare: Bare) -> set[str]:
    """Paths of the tables and of the layers that share their weight."""
    modules = dict(bare.named_modules())
    groups = (paths for paths in holders(bare).values() if len(paths) > 1)
    return {
        path for paths in groups if any(isinstance(modules[path], nn.Embedding) for path in paths) for path in paths
    }


def say_changed_base(configs: Iterable[LoraConfig]) -> None:
    """Where an adapter stands beside others whose start PEFT takes out of the base weights: such files are one thing here and one there."""
    variants = {config.variant for config in configs}
    found = next((name for variant, name in _CHANGES_BASE.items() if variant in variants), None)
    if found is not None:
        warn(
            f"{found} changes the base weights of the model and should thus not be used with other adapters in PEFT, where they would meet "
            "the changed base. minilora leaves the base alone, so here each one is exact"
        )


def say_left_out(model: nn.Module, report: LoadReport | None) -> None:
    """Name the tensors of another shape that ``ignore_mismatched_sizes`` has left as they were."""
    if report is not None and report.mismatched_keys:
        warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being ignored because you "
            f"passed `ignore_mismatched_sizes=True`: {', '.join(report.mismatched_keys)}"
        )


def say_renamed(config: LoraConfig, name: str | None) -> None:
    """Where a config names another base model than the one that it is used on."""
    if config.base_model_name_or_path not in (None, name):
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{config.base_model_name_or_path}' to '{name}'. It is what the "
            "model says, and what an adapter's file will say"
        )
