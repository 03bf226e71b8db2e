"""PEFT's layout with nothing in it that a reader could pass over: for vLLM and llama.cpp's converter. Next file: ``export/mlx.py``."""

from __future__ import annotations

import json
from typing import Any

from minilora.export.factors import Factors
from minilora.files.parse import tensor_bytes
from minilora.lora.config import LoraConfig
from minilora.store.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE

__all__ = ["plain_peft_files"]


def plain_peft_files(factors: Factors, r: int, content: dict[str, Any]) -> dict[str, bytes]:
    """PEFT's layout with nothing in it that a reader could skip: one rank, scale 1, plain names."""
    if (
        content.get("peft_type") != "LORA"
    ):  # the folder of a method with fields of its own: what it has in common with LoRA's
        known = LoraConfig().to_dict()
        content = known | {name: content[name] for name in known.keys() & content.keys() - {"peft_type"}}
    tensors = {}
    for path, (A, B) in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = A, B
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
    config = json.dumps(content | plain, indent=2) + "\n"
    return {WEIGHTS_FILE: tensor_bytes(tensors, {"format": "pt"}), CONFIG_FILE: config.encode()}


def _endings(factors: Factors) -> list[str]:
    """Last components, which is what readers compare the names of modules with."""
    return sorted({path.rsplit(".", 1)[-1] for path in factors})
