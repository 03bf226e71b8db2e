"""A GGUF file of a model: its weights under llama.cpp's names, rounded once, and all that llama.cpp asks a file for.

Onto a model that is a GGUF file itself, nothing is written anew but the weights with an update (``gguf/rewrite.py``).
Next file: ``hf/generate.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.gguf.names import Names
from minilora.gguf.rewrite import FILE_TYPES, encoded, type_of
from minilora.gguf.words import WEIGHTS
from minilora.gguf.write import Planned, fill_gguf
from minilora.hf.gguf_metadata import architecture_of, metadata
from minilora.hf.gguf_vocabulary import vocabulary
from minilora.linear.layers import is_conv1d

__all__ = ["fill_model", "tensors_of"]


@torch.no_grad()
def fill_model(model: Any, tokenizer: Any, path: Path, kind: str = "f16") -> None:
    """Write a dense model of transformers and its tokenizer to ``path``.

    Args:
        kind: of its weights, "q8_0", "f16" or "f32"; vectors and routers are fp32 in all of them.

    Raises:
        CheckpointError: the architecture, something in its config, or the tokenizer is not one that is written. StateError: a weight
            holds NaN or infinity, or a number that fp16 does not reach.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"{kind!r}: wanted one of {', '.join(WEIGHTS)}")
    config = model.config
    said = metadata(config) | vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])

    def describe(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name("merged")
        writer.add_quantization_version(2)
        writer.add_file_type(FILE_TYPES[kind])
        for key, value in said.items():
            _add(writer, key, value)

    planned: list[Planned] = []
    for name, weight in tensors_of(model):
        chosen = type_of(name, tuple(weight.shape), kind)
        make = functools.partial(encoded, name, weight, chosen)
        planned.append((name, tuple(weight.shape), chosen, make))
    fill_gguf(path, architecture_of(config), describe, planned)


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by its name in a GGUF file, rows in the file's order."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        kv_heads = config.num_kv_heads if not config.multi_query else 1
    names = Names(architecture_of(config), config.num_hidden_layers, heads, kv_heads, config.model_type)
    yield from _rope_factors(config)
    for key, weight in model.named_parameters():  # a tied head is the table of tokens, and not named a second time
        path, _, which = key.rpartition(".")
        if weight.dim() == 3:
            yield from _experts(names, key, weight)
            continue
        if weight.dim() == 2 and is_conv1d(model.get_submodule(path)):
            weight = weight.T
        place = names.place(path, len(weight), f".{which}")
        shift = names.known.norms if which == "weight" and path.endswith("norm") else 0.0
        yield place.name, place.of(weight) + shift if shift else place.of(weight)


def _experts(names: Names, key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each projection in a tensor of its own, as every llama.cpp reads them."""
    for place in names.experts(key, weight.shape[1], lambda name: "gate_up" not in name):
        yield place.name, place.of(weight, 1)


def _rope_factors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Llama 3's stretching of slow rotary angles, one factor for each pair (transformers, ``_compute_llama3_parameters``)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    lengths, old = 2 * math.pi / plain, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (old / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(lengths > old / low, torch.full_like(plain, factor), between)
    yield "rope_freqs.weight", torch.where(lengths < old / high, torch.ones_like(plain), factors)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
