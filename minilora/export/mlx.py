"""mlx-lm's layout. Next file: ``export/servers.py``."""

from __future__ import annotations

import json

from minilora.errors import StateError
from minilora.export.factors import Factors
from minilora.files.parse import tensor_bytes
from minilora.store.adapter_files import CONFIG_FILE

__all__ = ["inside_layer", "mlx_files"]


def mlx_files(factors: Factors, r: int) -> dict[str, bytes]:
    """mlx-lm's layout: ``lora_a [in, r]``, ``lora_b [r, out]``, and the keys of a layer relative to it; -1 means all layers."""
    tensors, keys = {}, set()
    for path, (A, B) in factors.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = A.T.contiguous(), B.T.contiguous()
        keys.add(inside_layer(path))
    parameters = {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    config = json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}, indent=2) + "\n"
    return {"adapters.safetensors": tensor_bytes(tensors, {}), CONFIG_FILE: config.encode()}


def inside_layer(path: str) -> str:
    """``model.layers.3.self_attn.q_proj`` to ``self_attn.q_proj``."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        raise StateError(
            f"{path}: mlx adapts the numbered layers of a model only; leave this one out of target_modules"
        )
    return ".".join(parts[numbers[0] + 1 :])
