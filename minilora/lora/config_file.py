"""What stands in PEFT's ``adapter_config.json``: the fields of ``LoraConfig``, and those of PEFT that minilora does not offer.

The latter are accepted at their default, kept in the file, and refused by name otherwise. Next file to read: ``lora/config.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from minilora.errors import ConfigError, nearest, warn
from minilora.files.validate import shown

# PEFT's remaining fields with their defaults: written to the file so that its key set is PEFT's, refused when set otherwise.
OUT_OF_SCOPE: dict[str, Any] = {
    "arrow_config": None,
    "kasa_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
WHY_NOT = {
    "layer_replication": "replicated layers share weights, so merging one would change its twins; build the deeper model first",
}
# Written by PEFT beside the fields; they describe the file, not the adapter.
FILE_FIELDS = ("auto_mapping", "peft_type", "peft_version", "runtime_config")
PEFT_LAYOUT = "0.21.2"  # the PEFT release whose file layout this is; PEFT reads it to judge unknown keys


class PeftType(enum.StrEnum):
    """The method: LoRA, with all its variants but one that has a layout of its own."""

    LORA = "LORA"
    VERA = "VERA"


# The configs of methods with files of their own: each is built on LoraConfig, and so imported when a file is of it.
_METHODS = {"VERA": ("minilora.lora.vera_config", "VeraConfig")}


def of_another_method(content: Mapping[str, Any]) -> Any:
    """The class of config that a file's content is of; None for LoRA's own, and for what no class here is for."""
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in _METHODS:
        return None
    module, name = _METHODS[kind]
    return getattr(importlib.import_module(module), name)


ABOUT: dict[str, Any] = {
    "auto_mapping": None,
    "peft_type": PeftType.LORA,
    "peft_version": PEFT_LAYOUT,
    "is_prompt_learning": False,
}


def content_of(own: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content from the fields of a ``LoraConfig``; a caller may change what it gets."""
    content = {name: _plain(value) for name, value in own.items()}
    alpha = content["lora_alpha"]
    if isinstance(alpha, float) and alpha.is_integer():
        content["lora_alpha"] = int(alpha)  # Ollama's reader takes unsigned integers only
    content = copy.deepcopy(content | OUT_OF_SCOPE)
    content.update(inference_mode=True, peft_type="LORA", peft_version=PEFT_LAYOUT, auto_mapping=None)
    return dict(sorted(content.items()))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def own_fields(content: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The arguments for ``LoraConfig``, whose fields are ``names``, in PEFT's dictionary. Raises ``ConfigError`` as its ``from_dict``."""
    kind = content.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"peft_type={shown(kind)}; minilora reads 'LORA' and 'VERA' adapters only")
    for name in unknown_keys(content, names):
        raise ConfigError(f"unknown key {name!r}; the closest known ones are {nearest(name, names)}")
    refuse_set({name: value for name, value in content.items() if name in OUT_OF_SCOPE})
    return {name: value for name, value in content.items() if name in names and value is not None}


def refuse_set(fields: Mapping[str, Any], method: str = "LORA") -> None:
    """Raise ``ConfigError`` for a field of PEFT's that is set otherwise than by default, and for one that PEFT lacks too."""
    for name, value in fields.items():
        if name in OUT_OF_SCOPE and value not in (OUT_OF_SCOPE[name], None, False, []):
            why = WHY_NOT.get(name, "a feature of PEFT that minilora does not offer")
            raise ConfigError(f"{name}={shown(value)}: {why}; leave it at {OUT_OF_SCOPE[name]!r}")
        if name == "peft_type" and getattr(value, "value", value) not in (method, None):
            raise ConfigError(f"peft_type={shown(value)}: minilora has 'LORA' here, and VeraConfig for 'VERA'")
        if name not in OUT_OF_SCOPE and name not in ABOUT:
            raise TypeError(f"LoraConfig got an unexpected field {name!r}; PEFT has none of that name either")


def say_unknown(names: Sequence[str], source: object, content: Mapping[str, Any]) -> None:
    """Warn of keys of a file, whose ``content`` this is, that ``LoraConfig`` (or ``VeraConfig``) does not have."""
    kind = "VeraConfig" if content.get("peft_type") == "VERA" else "LoraConfig"
    shown_names = [name[:60] for name in names[:8]]
    warn(
        f"Unexpected keyword arguments {shown_names} for class {kind}, these are ignored. {source} has them; PEFT would ignore them too"
    )


def unknown_keys(content: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The keys that are neither ``names`` nor PEFT's."""
    return sorted(
        name for name in content if name not in names and name not in OUT_OF_SCOPE and name not in FILE_FIELDS
    )
