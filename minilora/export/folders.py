"""The same adapter for other programs: vLLM, llama.cpp (and Ollama), MLX, diffusers.

Programs differ in how they find a layer's scale: llama.cpp's converter divides ``lora_alpha`` by the tensor's rank and so mis-scales
rsLoRA and alpha patterns without a word; others ignore rank patterns. Exporting therefore folds each layer's true scale into B, fills
ranks up to the largest with zeros, and sets ``lora_alpha = r``: every reader then computes 1. What a target cannot hold is refused.
Next file: ``export/factors.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.export.base import Base
from minilora.export.diffusers import component_of, for_diffusers
from minilora.export.factors import GGUF, Factor, Factors, Laid, factors_of
from minilora.export.mlx import for_mlx
from minilora.export.plain_peft import plain_peft
from minilora.export.programs import TARGETS, max_lora_rank, vllm_rank_hint
from minilora.export.stored import NeedsBase, stored_factors
from minilora.files.write import write_files
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import Stored, read_adapter, seal
from minilora.store.save import base_of, saved_config

__all__ = ["TARGETS", "export_adapter", "export_folder", "is_of_a_pipeline", "refusal"]


@torch.no_grad()
def export_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    target: str,
    adapter_name: str = "default",
    component: str | None = None,
) -> int:
    """Write an adapter of ``model`` for ``target`` (one of TARGETS); returns the rank that its layers have in the file.

    Args:
        component: for diffusers, which part of the pipeline the model is ("unet", "transformer", "text_encoder", ...); None finds out.

    Raises:
        ConfigError: unknown target or component. StateError: the adapter holds what the target cannot: copies of modules, trained biases or
            token rows; most take no DoRA, embeddings or experts. Nothing is written then.
    """
    _check_target(target)
    values = adapters_of(model).named(adapter_name)
    base = Base.of(model, values)
    _refuse_turned(saved_config(model, adapter_name), target, "the model")
    factors = factors_of(values, target)
    laid, r = _laid(factors, saved_config(model, adapter_name), target, base, component)
    write_files(folder, seal(laid.files(), base_of(model, adapter_name)))
    return r


@torch.no_grad()
def export_folder(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    target: str,
    expect_sha256: str | None = None,
    component: str | None = None,
) -> int:
    """``export_adapter`` from an adapter folder alone, for plain LoRA and rsLoRA, which need no base model; DoRA where the target takes it.

    Raises:
        ConfigError, StateError: as ``export_adapter``, or what depends on the base model. CheckpointError: a damaged folder.
    """
    _check_target(target)
    stored = read_adapter(adapter, expect_sha256=expect_sha256)
    laid, r = _laid_of(stored, target, component)
    write_files(folder, seal(laid.files(), stored.base))
    return r


@torch.no_grad()
def refusal(stored: Stored, target: str, component: str | None = None) -> tuple[str | None, bool]:
    """Why ``export_folder`` would write nothing of this adapter for ``target``, None if it would; and whether its base would help.

    The rules are those of the export itself, asked of shapes: no tensor is copied. Of GGUF they are those that need no file.
    """
    try:
        if target == GGUF:
            stored_factors(stored, GGUF, by_shapes=True)
        else:
            _laid_of(stored, target, component, by_shapes=True)
    except (StateError, CheckpointError) as error:
        return str(error).removeprefix(f"{stored.path}: "), isinstance(error, NeedsBase)
    return None, False


def is_of_a_pipeline(stored: Stored) -> bool:
    """Whether the adapter says that its model is a part of a pipeline of diffusers."""
    return bool(component_of(Base.stored(stored)))


def _refuse_turned(content: Mapping[str, Any], target: str, place: object) -> None:
    """llama.cpp's converter turns both factors of a ``Conv1D``, which a file has the right way round already: where the layer is square
    that is no error, and the adapter has another effect.
    """
    if target == "llama.cpp" and content.get("fan_in_fan_out"):
        raise StateError(
            f"{place}: llama.cpp's converter turns the factors of GPT-2's layers the wrong way round; "
            "give --base SERVED.gguf, and the GGUF LoRA is written without it"
        )


def _refuse_for_vllm(r: int, base: Base) -> None:
    if base.model_type == "gpt2" or base.model_class[0].startswith("GPT2"):
        raise StateError("vLLM takes no adapters of GPT-2 (its GPT2LMHeadModel has no LoRA); merge it instead")
    if max_lora_rank(r) is None:
        raise StateError(vllm_rank_hint(r))


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(f"export target {target!r}: wanted one of {', '.join(TARGETS)}")


def _laid_of(stored: Stored, target: str, component: str | None, by_shapes: bool = False) -> tuple[Laid, int]:
    base = Base.stored(stored)
    _refuse_turned(stored.config.to_dict(), target, stored.path)
    try:
        factors = stored_factors(stored, target, by_shapes)
    except NeedsBase:
        if target == "vllm":  # before the base is asked for, which would not help
            _refuse_for_vllm(1, base)
        raise
    return _laid(factors, stored.config.to_dict(), target, base, component)


def _laid(
    factors: Factors, content: dict[str, Any], target: str, base: Base, component: str | None
) -> tuple[Laid, int]:
    """The files that the program reads, and the rank in them."""
    r = max(factor.r for factor in factors.values())
    padded = {path: _padded(factor, r) for path, factor in factors.items()}
    if target == "vllm":
        _refuse_for_vllm(r, base)
    if target == "mlx":
        return for_mlx(padded, r, base), r
    if target == "diffusers":
        return for_diffusers(padded, base, component), r
    return plain_peft(padded, r, content), r


def _padded(factor: Factor, r: int) -> Factor:
    return replace(factor, A=_pad(factor.A, r, factor.A.dim() - 2), B=_pad(factor.B, r, factor.B.dim() - 1))


def _pad(factor: Tensor, r: int, dim: int) -> Tensor:
    missing = r - factor.shape[dim]
    zeros = factor.new_zeros(*(missing if axis == dim else size for axis, size in enumerate(factor.shape)))
    padded = torch.cat([factor, zeros], dim)
    return padded if padded.is_meta else padded.cpu().contiguous()
