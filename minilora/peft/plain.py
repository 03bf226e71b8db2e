"""An adapter that started from a part of the weight (PiSSA, OLoRA, CorDA, LoRA-GA), written as a plain LoRA of twice the rank.

With the start ``A0``, ``B0`` the update is ``s (B A - B0 A0) = s [B, -B0] [A; A0]``: the same numbers on the original base, exactly. PEFT
reads the start from a folder. Here the model knows it; the folder is compared, so that nobody subtracts another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError, warn
from minilora.files.parse import tensor_bytes
from minilora.lora.adapter import Adapter
from minilora.lora.config import LoraConfig
from minilora.lora.factors import beside
from minilora.lora.layer import LoRALinear
from minilora.lora.slots import adapters_of
from minilora.lora.variants.embedding import LoRAEmbedding, TiedEmbedding, TiedHead
from minilora.lora.variants.residual import ResidualLoRA
from minilora.peft.wrappers import is_rows
from minilora.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE, not_finite, read_adapter, seal
from minilora.store.save import base_of, file_key, laid_out, saved_config, tensors_of
from minilora.store.tables import saved_tables

__all__ = ["plain_files"]

_CLOSE = {
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # by the dtype of the folder, of the norms of both factors; fp32 1e-4
_STARTS = ("lora", "pissa", "olora", "corda", "lora_ga")


@torch.no_grad()
def plain_files(
    model: nn.Module,
    start: str | os.PathLike[str],
    adapter_name: str,
    save_embedding_layers: bool | str = "auto",
    base_config: Path | None = None,
) -> dict[str, bytes]:
    """The sealed files of an adapter as a plain LoRA; trained copies, biases and token rows stay as they are.

    Args:
        start: the folder in which this adapter was saved before it trained.
        save_embedding_layers, base_config: as ``saved_tables``.

    Raises:
        ConfigError: ``use_rslora`` with a pattern, whose scaling the file could not say. StateError: an update that is no low-rank product
            (DoRA, ``lora_bias``), one that makes up for a packed base (LoftQ), or NaN. CheckpointError: the folder has not this start.
    """
    config = adapters_of(model).configs[adapter_name]
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using `rank_pattern` or "
            "`alpha_pattern` at the same time as `use_rslora=True`; save without it, or save_as_lora"
        )
    if adapters_of(model).variants[adapter_name] not in _STARTS:
        warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA adapter to a LoRA adapter; "
            f"{adapter_name!r} is written as the LoRA that it is"
        )
    values = adapters_of(model).named(adapter_name)
    known = laid_out(values, read_adapter(start).tensors, False)
    tensors, tables = tensors_of(values), saved_tables(model, adapter_name, save_embedding_layers, base_config)
    for path, value in values.items():
        if isinstance(value, Adapter) and not is_rows(value):
            for name in value.file_names:  # a start may be among them
                tensors.pop(file_key(path, value, name), None)
            tensors |= _doubled(path, value, known, start)
    if (key := not_finite(tensors)) is not None:
        raise StateError(
            f"adapter {adapter_name!r} holds NaN or infinity in {key}; the training run diverged, save an earlier step"
        )
    held = {key: tensor.cpu().contiguous() for key, tensor in (tensors | tables).items()}
    content = _twice(saved_config(model, adapter_name), config)
    files = {
        WEIGHTS_FILE: tensor_bytes(held, {"format": "pt"}),
        CONFIG_FILE: f"{json.dumps(content, indent=2)}\n".encode(),
    }
    return seal(files, base_of(model, adapter_name, tables))


def _doubled(path: str, value: Adapter, known: Mapping[str, Tensor], start: object) -> dict[str, Tensor]:
    """The two factors of a layer beside its start's, under the names that a file has."""
    try:
        value.as_lora()
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    names = [name for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") if name in value.file_names]
    if value.replaces_base or not isinstance(value, (LoRALinear, LoRAEmbedding, TiedHead, TiedEmbedding)):
        raise StateError(
            f"{path}: a {type(value).__name__} is no plain LoRA on the original base; save it without a conversion"
        )
    keys = [file_key(path, value, name) for name in names]
    A, B = (getattr(value, name).detach() for name in names)
    A0, B0 = torch.zeros_like(A), torch.zeros_like(B)
    if isinstance(value, ResidualLoRA):
        A0, B0 = value.start_A.to(A), value.start_B.to(B)
    for key, own in zip(keys, (A, B), strict=True):
        if key not in known or known[key].shape != own.shape:
            found = f"as {list(known[key].shape)}" if key in known else "not at all"
            raise CheckpointError(
                f"{start}: has {key} {found}, wanted {list(own.shape)}: it is not the start of this adapter; give the folder in which it "
                "was saved before training"
            )
    experts = value.on == "experts"
    first, second = (known[key] for key in keys)
    _compare(path, (first.to(A).float(), second.to(B).float()), (A0.float(), B0.float()), first.dtype, start, experts)
    both = zip(names, beside(A, B, A0, -B0, experts), strict=True)
    return {key: value.to_file(name, tensor) for key, (name, tensor) in zip(keys, both, strict=True)}


def _compare(path: str, found: Any, own: Any, kind: torch.dtype, start: object, experts: bool) -> None:
    """Whether both pairs have one product (of experts: each expert's); that of a plain LoRA starts at zero."""
    (A, B), (A0, B0) = found, own
    size = (A.norm() + A0.norm()) * (B.norm() + B0.norm())
    if not experts:
        groups = len(A) // B.shape[1]
        A, B, A0, B0 = (each.flatten(1).unflatten(0, (groups, -1)) for each in (A, B, A0, B0))
    if not (B @ A - B0 @ A0).norm() <= _CLOSE.get(kind, 1e-4) * size:
        raise CheckpointError(
            f"{start}: {path} begins with another update than this adapter did; give the folder in which it was saved before training"
        )


def _twice(content: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
    """The config for twice the rank and the same scaling at every layer."""
    factor = 2**0.5 if config.use_rslora else 2
    return content | {
        "r": 2 * content["r"],
        "lora_alpha": factor * content["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in content["rank_pattern"].items()},
        "alpha_pattern": {name: 2 * alpha for name, alpha in content["alpha_pattern"].items()},
        "init_lora_weights": True,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
    }
