"""A variant that is asked for by its name, beside a config that may mean another one. Next file: ``lora/inject.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

from minilora.errors import ConfigError
from minilora.lora.config import LoraConfig
from minilora.lora.vera_config import VeraConfig

__all__ = ["as_named"]

# Variants that ``init_lora_weights`` means.
_STARTS = frozenset(("pissa", "olora", "orthogonal", "mica", "loftq", "corda", "lora_ga"))


def as_named(config: LoraConfig, variant: str | None) -> LoraConfig:
    """The config that means this variant, so that its file says so to other programs too; the same one where no field is about it.

    Raises:
        ConfigError: the config means another variant.
    """
    meant = config.variant
    if variant in (None, "", meant):
        return config
    if meant != "lora":
        field = "use_dora=True" if meant == "dora" else f"init_lora_weights={config.init_lora_weights!r}"
        field = {"alora": "alora_invocation_tokens", "vera": "a VeraConfig"}.get(meant, field)
        raise ConfigError(f"variant={variant!r}, and {field} means {meant!r}; leave one of the two out")
    if variant == "vera":
        return VeraConfig.of(config)
    if variant == "dora":
        return dataclasses.replace(config, use_dora=True)
    if variant not in _STARTS:
        return config
    own: dict[str, Any] = {} if getattr(config, f"{variant}_config", True) else {f"{variant}_config": {}}
    return dataclasses.replace(config, init_lora_weights=variant, **own)
