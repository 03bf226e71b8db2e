"""PEFT's functions that map a config to a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minilora.errors import ConfigError, TargetError, warn
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.inject import build_new, checked, place_in
from minilora.lora.match import match
from minilora.lora.slots import adapters_of, unwrapped
from minilora.lora.vera_config import VeraConfig
from minilora.peft.faces import give_faces
from minilora.peft.lora_model import LoraModel
from minilora.peft.meta import emptied
from minilora.peft.notes import say_new
from minilora.store.adapter_files import PREFIX

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = {"LORA": LoraConfig, "VERA": VeraConfig}
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, Any] = {"LORA": LoraModel}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, Any] = {}


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """The config of a dictionary with a ``peft_type``. Raises ``ConfigError`` for another type than LORA and VERA."""
    if "peft_type" not in config_dict:
        raise ConfigError("the dictionary has no peft_type; wanted one with peft_type='LORA'")
    kind = getattr(config_dict["peft_type"], "value", config_dict["peft_type"])
    return PEFT_TYPE_TO_CONFIG_MAPPING.get(str(kind), LoraConfig)(**config_dict)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: Any,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Any:
    """``inject`` with PEFT's order of arguments: the model gains layers with PEFT's names and no methods.

    Args:
        low_cpu_mem_usage: make the adapter without values, on the meta device; ``set_peft_model_state_dict`` brings them.
        state_dict: an adapter's tensors: exactly the layers that it has are adapted, whatever ``target_modules`` says. It is not loaded.
    """
    config = checked(peft_config)
    if state_dict is not None:
        if config.target_parameters:
            raise ConfigError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: its names do not say "
                "which weights they are of; inject without the state_dict"
            )
        config = _targets_of(model, config, state_dict)
    values = build_new(model, config, adapter_name, None)
    say_new(model, config, values)
    if low_cpu_mem_usage:
        emptied(values)
    with LOCK, Change() as change:
        place_in(change, model, config, adapter_name, values)
        give_faces(change, model)
        change.item(unwrapped(model).__dict__, "peft_config", adapters_of(model).configs)
    return model


def _targets_of(model: Any, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The config with the layers that an adapter's tensors belong to; warns where the config itself means others."""
    found = (
        re.split(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b", key)[0]
        for key in tensors
        if ".lora_" in key
    )
    paths = dict.fromkeys(path.removeprefix(PREFIX).replace("_orig_mod.", "") for path in found)
    if not paths:
        raise ConfigError(
            "state_dict holds no tensor of an adapter; wanted names such as 'layers.0.q_proj.lora_A.weight'"
        )
    try:
        meant = set(match(model, config).targets)
    except TargetError:  # it need not say anything about this model
        meant = set(paths)
    more = {"PEFT config": sorted(meant - paths.keys()), "state_dict": sorted(paths.keys() - meant)}
    if said := [
        f"The {where} contained these additional target modules: {names}. " for where, names in more.items() if names
    ]:
        warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided state_dict. This "
            f"is not necessarily an issue and can be ignored if this was the intent. {''.join(said)}The state_dict counts",
            RuntimeWarning,
        )
    return dataclasses.replace(
        config, target_modules=list(paths), exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
