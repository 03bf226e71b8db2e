"""The same adapter for other programs: vLLM, llama.cpp (and Ollama), MLX.

Programs differ in how they find a layer's scale: llama.cpp's converter divides ``lora_alpha`` by the tensor's rank and so mis-scales
rsLoRA and alpha patterns without a word; others ignore rank patterns. Exporting therefore folds each layer's true scale into B, fills
ranks up to the largest with zeros, and sets ``lora_alpha = r``: every reader then computes 1. What a target cannot hold is refused.
Next file: ``export/factors.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.export.factors import Factors, factors_of, stored_factors
from minilora.export.mlx import inside_layer, mlx_files
from minilora.export.plain_peft import plain_peft_files
from minilora.export.programs import TARGETS
from minilora.files.write import write_files
from minilora.lora.slots import adapters_of
from minilora.quant.finite import is_finite
from minilora.store.adapter_files import Stored, read_adapter, seal
from minilora.store.save import base_of, saved_config

__all__ = ["TARGETS", "export_adapter", "export_folder", "refusal"]


@torch.no_grad()
def export_adapter(model: nn.Module, folder: str | os.PathLike[str], target: str, adapter_name: str = "default") -> int:
    """Write an adapter of ``model`` for ``target`` (one of TARGETS); returns the rank that its layers have in the file.

    Raises:
        ConfigError: unknown target. StateError: the adapter holds what the target cannot: full-rank updates (DoRA), copies of modules,
            trained biases or token rows, embeddings. Nothing is written then.
    """
    _check_target(target)
    adapters = adapters_of(model)
    _refuse_turned(saved_config(model, adapter_name), target, "the model")
    factors = {path: factors_of(path, value, target) for path, value in adapters.named(adapter_name).items()}
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
    _refuse_turned(stored.config.to_dict(), target, stored.path)
    return _write(stored_factors(stored), stored.config.to_dict(), folder, target, stored.base)


def refusal(stored: Stored, target: str) -> str | None:
    """Why ``export_folder`` would write nothing of this adapter for ``target``; None if it would."""
    try:
        _refuse_turned(stored.config.to_dict(), target, stored.path)
        factors = stored_factors(stored)
        for path in factors if target == "mlx" else ():
            inside_layer(path)
    except (StateError, CheckpointError) as error:
        return str(error).removeprefix(f"{stored.path}: ")
    return None


def _refuse_turned(content: Mapping[str, Any], target: str, place: object) -> None:
    """llama.cpp's converter turns both factors of a ``Conv1D``, which a file has the right way round already: where the layer is square
    that is no error, and the adapter has another effect.
    """
    if target == "llama.cpp" and content.get("fan_in_fan_out"):
        raise StateError(
            f"{place}: llama.cpp's converter turns the factors of GPT-2's layers the wrong way round; "
            "give --base SERVED.gguf, and the GGUF LoRA is written without it"
        )


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(f"export target {target!r}: wanted one of {', '.join(TARGETS)}")


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
    files = mlx_files(padded, r) if target == "mlx" else plain_peft_files(padded, r, content)
    write_files(folder, seal(files, base))
    return r


def _pad(factor: Tensor, r: int, dim: int) -> Tensor:
    missing = r - factor.shape[dim]
    zeros = factor.new_zeros(*(missing if axis == dim else size for axis, size in enumerate(factor.shape)))
    return torch.cat([factor, zeros], dim).cpu().contiguous()
