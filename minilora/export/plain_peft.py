"""PEFT's layout with nothing in it that a reader could pass over: for vLLM and llama.cpp's converter. Next file: ``export/mlx.py``."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from minilora.export.factors import Factors, Laid
from minilora.lora.config import LoraConfig
from minilora.store.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE

__all__ = ["plain_peft"]

_OF_THE_BASE = ("base_model_name_or_path", "task_type", "auto_mapping", "revision", "fan_in_fan_out")


def plain_peft(factors: Factors, r: int, content: dict[str, Any]) -> Laid:
    """PEFT's layout with nothing in it that a reader could skip: one rank, scale 1, plain names."""
    if content.get("peft_type", "LORA") != "LORA":  # VeRA's words, and what is written is a plain LoRA
        content = LoraConfig().to_dict() | {name: content[name] for name in _OF_THE_BASE if name in content}
    tensors: dict[str, Tensor] = {}
    for path, factor in factors.items():
        if factor.kind == "embedding":  # its table is the transpose of a linear layer's weight
            halves = {"lora_embedding_A": factor.B.T.contiguous(), "lora_embedding_B": factor.A.T.contiguous()}
        else:
            halves = {"lora_A.weight": factor.A, "lora_B.weight": factor.B}
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in halves.items()}
    plain = {
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "target_modules": _endings(factors),
        "bias": "none",
        "lora_bias": False,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    config = json.dumps(_of_lora(content) | plain, indent=2) + "\n"
    return Laid(WEIGHTS_FILE, tensors, {"format": "pt"}, {CONFIG_FILE: config})


def _of_lora(content: dict[str, Any]) -> dict[str, Any]:
    """The config as LoRA's: that of a variant with a layout of its own (VeRA) says only whose it is and where it goes."""
    if content.get("peft_type", "LORA") == "LORA":
        return content
    known = LoraConfig(target_modules=["any"]).to_dict()
    return known | {name: value for name, value in content.items() if name in known and name != "peft_type"}


def _endings(factors: Factors) -> list[str]:
    """Last components, which is what readers compare the names of modules with."""
    return sorted({path.rsplit(".", 1)[-1] for path in factors})
