"""mlx-lm's layout: every adapted layer by its full path, in mlx-lm's own names. Next file: ``export/diffusers.py``.

mlx-lm puts LoRA on the layers that ``keys`` names: paths inside a numbered block, or whole paths in the model. Whole paths name exactly
the layers that are adapted, and the head and the embedding too. Where the head of a model is its embedding (tied), mlx-lm computes with
one module for both, so an update of either alone cannot be told to it.
"""

from __future__ import annotations

import json

from torch import Tensor

from minilora.errors import StateError
from minilora.export.base import Base
from minilora.export.factors import Factor, Factors, Laid
from minilora.export.stored import NeedsBase
from minilora.store.adapter_files import CONFIG_FILE

__all__ = ["for_mlx"]

# Beginnings of paths that mlx-lm names otherwise, by the model type; of the others the names are the same.
_RENAMED = {
    "gpt2": {"transformer.": "model."},
    "gpt_neox": {"gpt_neox.layers.": "model.h.", "gpt_neox.": "model.", "embed_out": "model.embed_out"},
}
# Where mlx-lm keeps the experts of an architecture: the module's last names here, and there.
_SWITCH = {
    "qwen2_moe": ("mlp.experts", "mlp.switch_mlp"),
    "qwen3_moe": ("mlp.experts", "mlp.switch_mlp"),
    "olmoe": ("mlp.experts", "mlp.switch_mlp"),
    "mixtral": ("mlp.experts", "block_sparse_moe.switch_mlp"),
}


def for_mlx(factors: Factors, r: int, base: Base) -> Laid:
    """``lora_a [in, r]``, ``lora_b [r, out]``; of an embedding ``[tokens, r]``, ``[r, dim]``; of experts ``[E, r, in]``, ``[E, out, r]``.

    Raises:
        NeedsBase: whether the base ties its head is not known, and it matters. StateError: what mlx-lm cannot hold.
    """
    magnitudes = [factor.magnitude is not None for factor in factors.values()]
    if any(magnitudes) and not all(magnitudes):
        path = next(path for path, factor in factors.items() if factor.magnitude is None)
        raise StateError(
            f"{path}: mlx holds DoRA on all adapted layers or on none, and this one has none; merge instead"
        )
    tensors: dict[str, Tensor] = {}
    for path, factor in factors.items():
        _refuse_tied(path, factor, base)
        tensors |= _expert(path, factor, base) if factor.kind == "experts" else _layer(_renamed(path, base), factor)
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    parameters = {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": keys}
    kind = "dora" if any(magnitudes) else "lora"
    config = json.dumps({"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}, indent=2) + "\n"
    return Laid("adapters.safetensors", tensors, texts={CONFIG_FILE: config})


def _layer(path: str, factor: Factor) -> dict[str, Tensor]:
    A, B = (factor.B.T, factor.A.T) if factor.kind == "embedding" else (factor.A, factor.B)
    tensors = {f"{path}.lora_a": A.T.contiguous(), f"{path}.lora_b": B.T.contiguous()}
    return tensors if factor.magnitude is None else tensors | {f"{path}.m": factor.magnitude.flatten().contiguous()}


def _expert(path: str, factor: Factor, base: Base) -> dict[str, Tensor]:
    """Of ``gate_up_proj``, which mlx-lm keeps as two projections, both halves of B with the same A."""
    owner, _, name = path.rpartition(".")
    here, there = _SWITCH.get(base.model_type, ("", ""))
    if not here or not owner.endswith(here) or name not in ("gate_up_proj", "down_proj"):
        raise StateError(
            f"{path}: experts of {base.model_type or 'this model'} have not been tried in mlx; merge instead"
        )
    halves = {"gate_proj": factor.B.chunk(2, 1)[0], "up_proj": factor.B.chunk(2, 1)[1]}
    halves = halves if name == "gate_up_proj" else {name: factor.B}
    place = owner.removesuffix(here) + there
    lows = {f"{place}.{half}.lora_b": B.contiguous() for half, B in halves.items()}
    return lows | {f"{place}.{half}.lora_a": factor.A.contiguous().clone() for half in halves}


def _renamed(path: str, base: Base) -> str:
    kind = base.model_type or ("gpt_neox" if path.startswith(("gpt_neox.", "embed_out")) else "")
    for here, there in _RENAMED.get(kind, {}).items():
        if path.startswith(here):
            return there + path.removeprefix(here)
    return path


def _refuse_tied(path: str, factor: Factor, base: Base) -> None:
    """An embedding's or a head's update alone, where mlx-lm has one module for both."""
    outside = not any(part.isdigit() for part in path.split("."))
    if outside and base.tied is None:
        raise NeedsBase(
            f"{path}: mlx has one module for a head and an embedding that are tied; give the base with --model"
        )
    if base.tied and path == base.head:
        raise StateError(
            f"{path}: the head is tied to the embedding, and mlx has one module for both; merge the adapter instead"
        )
    if base.tied and factor.kind == "embedding" and not base.head_follows:
        raise StateError(
            f"{path}: the head is tied to this embedding, and in mlx the update would reach it too; merge the adapter instead"
        )
