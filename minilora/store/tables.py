"""The base's embedding tables in an adapter's file: PEFT saves them where an embedding is adapted, or the vocabulary was resized.

Rows of tokens that were added are in no checkpoint of the base: drawn at random, they are other ones the next time, and an adapter that
was trained on them would be worth nothing. So the file brings the table, and loading it writes it into the model's base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError
from minilora.linear.layers import is_quantized
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import Value
from minilora.lora.slots import adapters_of, has_adapters
from minilora.lora.variants.embedding import LoRAEmbedding, Tied
from minilora.lora.variants.lora_fa import LoRAFALinear
from minilora.lora.variants.mica import MiCALinear
from minilora.lora.variants.tokens import TokenRows
from minilora.store.adapter_files import PREFIX

__all__ = ["brought_tables", "saved_tables", "table_of"]

_NAMES = ("embed_tokens", "lm_head")  # what PEFT takes for an embedding in target_modules
# What is made of its file and the base layer's output alone, so that another base weight may come under it.
_STANDS_ANYWHERE = (LoRALinear, LoRAFALinear, MiCALinear)


def saved_tables(
    model: nn.Module, adapter_name: str, save: bool | str = "auto", base_config: Path | None = None
) -> dict[str, Tensor]:
    """File name to base weight of the tables that the adapter's file brings, over the model's memory.

    Args:
        save: True for the input and the output embedding, False for none, "auto" if one called "embed_tokens" or "lm_head" is
            adapted and no token rows train, or if the vocabulary is not that of the base's ``config.json``.
        base_config: that file; None for the one in the folder that the config or the model names.

    Raises:
        ConfigError: another value.
    """
    if not isinstance(save, bool) and save != "auto":
        raise ConfigError(f"save_embedding_layers={save!r}: wanted True, False or 'auto'")
    values, bare, config = adapters_of(model).named(adapter_name), Bare(model), adapters_of(model).configs[adapter_name]
    adapted = {path for path, value in values.items() if isinstance(value, (LoRALinear, LoRAEmbedding, Tied))}
    targeted = config.trainable_token_indices is None and any(path.rsplit(".", 1)[-1] in _NAMES for path in adapted)
    resized = save is not False and _resized(bare, config.base_model_name_or_path, base_config)
    if save is False or (save == "auto" and not targeted and not resized):
        return {}
    tables = [bare.get_input_embeddings(), bare.get_output_embeddings()]
    only_adapted = targeted and not resized  # the other one may have grown too
    found: dict[str, Tensor] = {}
    for path, module in bare.named_modules():
        rows = isinstance(values.get(path), TokenRows) and not only_adapted
        wanted = path in adapted or rows or not (only_adapted or path in values)  # copies bring their own
        if wanted and not is_quantized(module) and any(module is table for table in tables):
            inner = ".base_layer" if path in adapted else ".token_adapter.base_layer" if rows else ""
            found[f"{PREFIX}{path}{inner}.weight"] = module.weight.detach()  # type: ignore[operator]
    return found


def table_of(key: str) -> str:
    """The path of the layer whose weight a file has under this name."""
    path = key.removeprefix(PREFIX).removesuffix(".weight")
    return path.removesuffix(".base_layer").removesuffix(".token_adapter")


def _resized(bare: Bare, base: str | None, base_config: Path | None) -> bool:
    """Whether the vocabulary has another size than the base model's config on disk says."""
    own: Any = getattr(bare.config, "vocab_size", None)
    folder = base or getattr(bare.config, "_name_or_path", None)
    file = base_config or (Path(folder) / "config.json" if folder else None)
    if own is None or file is None or not file.is_file():
        return False
    try:
        before = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(before, dict) and before.get("vocab_size", own) != own


def brought_tables(
    model: nn.Module,
    values: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    fresh: bool,
    ignore_mismatched_sizes: bool = False,
) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """``({parameter of the base: what the file has}, keys, unlike)``: the tables in a file that are not the model's, the keys of all,
    and of those that are of another shape and so left out (``ignore_mismatched_sizes``).

    Raises:
        CheckpointError: a base weight that the model lacks, or has in another size, one under other adapters, or one under an adapter
            whose start or norms were made from the model's own.
    """
    bare, keys = Bare(model), [key for key in tensors if key not in own and key.endswith(".weight")]
    heads = [bare.get_input_embeddings(), bare.get_output_embeddings()]
    modules = dict(bare.named_modules())
    new: dict[str, Tensor] = {}
    known: set[str] = set()
    unlike: set[str] = set()
    for key in keys:
        inside, path = key.endswith(".base_layer.weight"), table_of(key)
        module = modules.get(path)
        is_table = isinstance(module, nn.Embedding) or (module is not None and any(module is head for head in heads))
        if not inside and not is_table:
            continue
        known.add(key)
        weight = None if module is None or is_quantized(module) else module._parameters.get("weight")
        if weight is not None and weight.shape != tensors[key].shape and ignore_mismatched_sizes:
            unlike.add(key)
            continue
        if weight is None or weight.shape != tensors[key].shape:
            raise CheckpointError(
                f"{key}: the file brings another base weight than the model has; load that base model, or resize this one"
            )
        if torch.equal(weight.detach().cpu(), tensors[key].to(weight.dtype)):
            continue
        value = values.get(path)
        free = value is None or isinstance(value, (LoRAEmbedding, TokenRows, Tied)) or type(value) in _STANDS_ANYWHERE
        if not is_table or not free or _others(model, fresh):
            why = "other adapters stand on that one" if is_table and free else "and the adapter depends on it"
            raise CheckpointError(
                f"{key}: the file brings another base weight than the model has, {why}; load that base model"
            )
        new[f"{path}.weight"] = tensors[key]
    return new, known, unlike


def _others(model: nn.Module, fresh: bool) -> bool:
    return has_adapters(model) and len(adapters_of(model).configs) > (0 if fresh else 1)


def carrier(values: Mapping[str, Value]) -> Adapter | None:
    """The adapter that carries a file's tables to the place where they are written."""
    return next((value for value in values.values() if isinstance(value, Adapter)), None)
