"""The same adapter for other programs: vLLM, llama.cpp (and Ollama), MLX.

Programs differ in how they find a layer's scale: llama.cpp's converter divides ``lora_alpha`` by the tensor's rank and so mis-scales
rsLoRA and alpha patterns without a word; others ignore rank patterns. Exporting therefore folds each layer's true scale into B, fills
ranks up to the largest with zeros, and sets ``lora_alpha = r``: every reader then computes 1. What a target cannot hold is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.files.parse import tensor_bytes
from minilora.files.write import write_files
from minilora.lora.adapter import Adapter
from minilora.lora.slots import adapters_of
from minilora.lora.variants.attention import LoRAOutProj
from minilora.lora.variants.embedding import TiedHead
from minilora.quant.finite import is_finite
from minilora.store.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Stored, read_adapter, refuse_regexes, seal
from minilora.store.contents import parameters_in
from minilora.store.programs import TARGETS
from minilora.store.save import base_of, saved_config

__all__ = ["TARGETS", "export_adapter", "export_folder", "refusal"]

Factors = Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def export_adapter(model: nn.Module, folder: str | os.PathLike[str], target: str, adapter_name: str = "default") -> int:
    """Write an adapter of ``model`` for ``target`` (one of TARGETS); returns the rank that its layers have in the file.

    Raises:
        ConfigError: unknown target. StateError: the adapter holds what the target cannot: full-rank updates (DoRA), copies of modules,
            trained biases or token rows, embeddings. Nothing is written then.
    """
    _check_target(target)
    adapters = adapters_of(model)
    factors = {path: _factors(path, value, target) for path, value in adapters.named(adapter_name).items()}
    return _write(factors, saved_config(model, adapter_name), folder, target, base_of(model, adapter_name))


@torch.no_grad()
def export_folder(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    target: str,
    expect_sha256: str | None = None,
) -> int:
    """``export_adapter`` from an adapter folder alone, for plain LoRA and rsLoRA, which need no base model.

    Raises:
        ConfigError, StateError: as ``export_adapter``, or a variant that needs its base model. CheckpointError: a damaged folder.
    """
    _check_target(target)
    stored = read_adapter(adapter, expect_sha256=expect_sha256)
    return _write(_stored_factors(stored), stored.config.to_dict(), folder, target, stored.base)


def refusal(stored: Stored, target: str) -> str | None:
    """Why ``export_folder`` would write nothing of this adapter for ``target``; None if it would."""
    try:
        factors = _stored_factors(stored)
        for path in factors if target == "mlx" else ():
            _inside_layer(path)
    except (StateError, CheckpointError) as error:
        return str(error).removeprefix(f"{stored.path}: ")
    return None


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(f"export target {target!r}: wanted one of {', '.join(TARGETS)}")


def _factors(path: str, value: object, target: str) -> tuple[Tensor, Tensor]:
    if isinstance(value, (LoRAOutProj, TiedHead)) or (isinstance(value, Adapter) and value.on != "linear"):
        raise StateError(
            f"{path}: {target} takes adapters of linear layers only; merge this one into the model instead"
        )
    if not isinstance(value, Adapter):
        raise StateError(
            f"{path}: {target} cannot hold a trained copy or bias; merge the adapter into the model instead"
        )
    try:
        return value.as_lora()
    except StateError as error:
        raise StateError(f"{path}: {error}") from None


def _stored_factors(stored: Stored) -> dict[str, tuple[Tensor, Tensor]]:
    """Scaled factors from the file alone."""
    if stored.variant != "lora":
        raise StateError(f"{stored.path}: a {stored.variant} adapter depends on its base model; give it with --model")
    refuse_regexes(stored)
    for path in parameters_in(stored).values():
        raise StateError(
            f"{stored.path}: {path} is a projection of experts, and other programs differ in how they read those; merge instead"
        )
    if routers := [entry for entry in stored.config.target_parameters or () if entry.endswith("weight")]:
        raise StateError(f"{stored.path}: {routers[0]} is no weight that other programs adapt; merge instead")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        path, _, name = key.removeprefix(PREFIX).rpartition(".lora_")
        if name not in ("A.weight", "B.weight") or tensor.dim() != 2 or ".base_layer." in key:
            raise StateError(
                f"{stored.path}: {key} is no factor of a linear layer, and other programs cannot hold it; merge instead"
            )
        parts.setdefault(path, {})[name] = tensor.float()
    for path, pair in parts.items():
        if len(pair) < 2:
            raise StateError(f"{stored.path}: {path} has only one of lora_A and lora_B; save the adapter again")
        wanted, found = stored.config.for_module(path)[0], len(pair["A.weight"])
        if wanted != found:
            raise CheckpointError(f"{stored.path}: {path} has rank {found}, the config says {wanted}; save it again")
    return {path: (pair["A.weight"], stored.config.scaling(path) * pair["B.weight"]) for path, pair in parts.items()}


def _write(
    factors: Factors,
    content: dict[str, Any],
    folder: str | os.PathLike[str],
    target: str,
    base: Mapping[str, Any] | None,
) -> int:
    r = max(len(A) for A, _ in factors.values())
    padded = {path: (_pad(A, r, 0), _pad(B, r, 1)) for path, (A, B) in factors.items()}
    for path, pair in padded.items():
        if not all(map(is_finite, pair)):
            raise StateError(
                f"{path}: its scaled factors hold NaN or infinity, so nothing is exported; load an earlier save"
            )
    files = _mlx_files(padded, r) if target == "mlx" else _peft_files(padded, r, content)
    write_files(folder, seal(files, base))
    return r


def _pad(factor: Tensor, r: int, dim: int) -> Tensor:
    missing = r - factor.shape[dim]
    zeros = factor.new_zeros(*(missing if axis == dim else size for axis, size in enumerate(factor.shape)))
    return torch.cat([factor, zeros], dim).cpu().contiguous()


def _peft_files(factors: Factors, r: int, content: dict[str, Any]) -> dict[str, bytes]:
    """PEFT's layout with nothing in it that a reader could skip: one rank, scale 1, plain names."""
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


def _mlx_files(factors: Factors, r: int) -> dict[str, bytes]:
    """mlx-lm's layout: ``lora_a [in, r]``, ``lora_b [r, out]``, and the keys of a layer relative to it; -1 means all layers."""
    tensors, keys = {}, set()
    for path, (A, B) in factors.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = A.T.contiguous(), B.T.contiguous()
        keys.add(_inside_layer(path))
    parameters = {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    config = json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}, indent=2) + "\n"
    return {"adapters.safetensors": tensor_bytes(tensors, {}), CONFIG_FILE: config.encode()}


def _inside_layer(path: str) -> str:
    """``model.layers.3.self_attn.q_proj`` to ``self_attn.q_proj``."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        raise StateError(
            f"{path}: mlx adapts the numbered layers of a model only; leave this one out of target_modules"
        )
    return ".".join(parts[numbers[0] + 1 :])
