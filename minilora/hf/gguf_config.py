"""The config of the model in a GGUF file: transformers' table of what each entry of the metadata is called, and what that table leaves out.

transformers reads some architectures with entries missing (the base of the rotary angles, the width of a head, the caps of Gemma's logits,
who ends an answer), and then its defaults stand in silently. Here every entry of the model's own is known, or the file is refused by the
entry's name. Next file: ``hf/gguf_model.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minilora.errors import CheckpointError
from minilora.files.validate import shown
from minilora.gguf.file import GGUF, open_gguf
from minilora.hf.folders import import_transformers, refuse_endless
from minilora.hf.gguf_entries import entries

__all__ = ["KNOWN", "gguf_config", "gguf_config_of"]

# What each architecture is called by transformers; all of them are tested against the models that the files were made of.
KNOWN = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "llama": "llama",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
_SAID_BY_TENSORS = ("attention.value_length", "vocab_size")
_HEADS = ("attention.head_count", "attention.head_count_kv", "attention.key_length")
_ANGLES = ("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
_ROPE_FREQS = "rope_freqs.weight"
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_config_of(path: Path) -> Any:
    """The same of a file that is not open."""
    with open_gguf(path) as file:
        return gguf_config(file)


def gguf_config(file: GGUF) -> Any:
    """The config, as ``AutoModelForCausalLM.from_config`` takes it.

    Raises:
        CheckpointError: the architecture, or an entry that changes what the model computes, is not known; or one is missing or cannot be.
    """
    transformers = import_transformers()
    arch = file.architecture
    if arch not in KNOWN:
        raise CheckpointError(
            f"{file.path}: is of the architecture {shown(arch)}; known are {', '.join(KNOWN)}; load the model that it was made of"
        )
    own = _own(file)
    fields = _fields(file, own) | _tokens(file) | _rotary(file, own) | _OWN.get(arch, _nothing)(own)
    fields |= {
        field: file.tensors[name].shape[-1] for field, name in _WIDTHS.get(arch, {}).items() if name in file.tensors
    }
    fields |= {field: any(name in file.tensors for name in names) for field, names in _BIASES.get(arch, {}).items()}
    try:
        config = transformers.AutoConfig.for_model(KNOWN[arch], **fields)
        refuse_endless([config], str(file.path))
        return config
    except CheckpointError:
        raise
    except Exception as error:  # of numbers that no model has anything can come
        raise CheckpointError(f"{file.path}: its metadata makes no model ({type(error).__name__}: {error})") from None


def _own(file: GGUF) -> dict[str, Any]:
    """The entries of the architecture, those that llama.cpp opens no file without among them."""
    arch, table = file.architecture, _table(file.architecture)
    own = entries(file, {*table, *_SAID_BY_TENSORS, *_HEADS, *(_ANGLES if arch != "gpt2" else ())})
    epsilon = next(key for key in table if key.endswith("epsilon"))
    for key in ("block_count", "embedding_length", "attention.head_count", "context_length", epsilon):
        if not own.get(key):
            raise CheckpointError(f"{file.path}: its metadata lacks {arch}.{key}; make the file anew")
    used, count = own.get("expert_used_count", 0), own.get("expert_count", 0)
    if "expert_count" in table and not 1 <= used <= count:
        raise CheckpointError(
            f"{file.path}: its metadata says that {used} of {count} experts are used; make the file anew"
        )
    if "attention.head_count_kv" in table:
        own.setdefault("attention.head_count_kv", own["attention.head_count"])
    return own


def _table(arch: str) -> dict[str, str | None]:
    """Endings of entries to the config's fields: transformers' own table, and what it lacks."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    own = GGUF_CONFIG_MAPPING[_LIKE.get(arch, arch)]
    return {key: name for key, name in own.items() if key not in _ANGLES} | _ALSO.get(arch, {})


def _fields(file: GGUF, own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: own[key] for key, name in _table(file.architecture).items() if name is not None and key in own}


def _tokens(file: GGUF) -> dict[str, Any]:
    """The vocabulary, who begins a text and who ends an answer, and whether the head is the embedding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: has no token_embd.weight; wanted a language model's GGUF file")
    ids = {name: file.said(f"tokenizer.ggml.{name}_token_id", int) for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    return {
        "vocab_size": embedding.shape[0],
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": ids["padding"],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _rotary(file: GGUF, own: Mapping[str, Any]) -> dict[str, Any]:
    """The width of a head, how much of it turns, and the base of the angles; nothing for a model with learned places."""
    if file.architecture == "gpt2":
        return {}
    width = own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"])
    turning = own.get("rope.dimension_count", width)
    if own.get("attention.value_length", width) != width:
        raise CheckpointError(
            f"{file.path}: its heads have keys of {width} and values of {own['attention.value_length']}"
        )
    rope = _stretched(file, own)
    if file.architecture in _PARTIAL:
        rope["partial_rotary_factor"] = turning / width
    elif turning != width:
        raise CheckpointError(
            f"{file.path}: turns {turning} of the {width} numbers of a head, which is not read of {file.architecture!r} yet"
        )
    if _ROPE_FREQS in file.tensors:
        rope |= _llama3(file, rope, width)
    if file.architecture == "gemma3":  # layers that see little of the text turn by angles of their own, never stretched
        near = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10_000.0)}
        return {"head_dim": width, "rope_parameters": {"full_attention": rope, "sliding_attention": near}}
    return {"head_dim": width, "rope_parameters": rope}


_PARTIAL = ("phi3", "stablelm")


def _stretched(file: GGUF, own: Mapping[str, Any]) -> dict[str, Any]:
    """The base of the angles, and how far they are stretched: evenly, or not at all. As in llama.cpp, no factor and one of 0 are none."""
    base, kind = own.get("rope.freq_base", 10_000.0), own.get("rope.scaling.type", "linear")
    if base <= 0 or kind not in ("linear", "none"):
        name, value = ("freq_base", base) if base <= 0 else ("scaling.type", kind)
        raise CheckpointError(
            f"{file.path}: its metadata says {file.architecture}.rope.{name}={shown(value)}, which is not read yet; load the model that it "
            "was made of"
        )
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0)) or 1.0
    if kind == "none" or factor == 1.0:
        return {"rope_type": "default", "rope_theta": base}
    return {"rope_type": "linear", "rope_theta": base, "factor": factor}


def _llama3(file: GGUF, rope: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Llama 3's rule for long texts, found by the factors that the file holds for it. Raises ``CheckpointError`` for others."""
    base = rope["rope_theta"]
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"{file.path}: stretches its angles by a factor and by {_ROPE_FREQS}; load the model that it was made of"
        )
    found = file.values(_ROPE_FREQS)
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0):
        if torch.allclose(found, _factors(base, width, factor), rtol=1e-3):
            return {**_LLAMA3, "factor": factor}
    raise CheckpointError(
        f"{file.path}: its {_ROPE_FREQS} is none that Llama 3's rule for long texts gives; load the model that it was made of"
    )


def _factors(base: float, width: int, factor: float) -> torch.Tensor:
    """What each angle's frequency is divided by (Llama 3.1): 1 for short waves, ``factor`` for long ones, a mean between them."""
    waves = 2 * torch.pi * base ** (torch.arange(0, width, 2) / width)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = ((_LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


# ---- what only one architecture has


def _nothing(own: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _gemma3(own: Mapping[str, Any]) -> dict[str, Any]:
    """Without a window llama.cpp has no layer that sees little of the text, and transformers' own default is one of 4096."""
    fields = _gemma(own, 62)
    if own.get("attention.sliding_window"):
        return fields
    return fields | {"layer_types": ["full_attention"] * own["block_count"]}


def _gemma(own: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """Queries are scaled by the width of a head, and in the largest model (27B, by its layers) by what heads share."""
    shared = own["embedding_length"] // own["attention.head_count"]
    width = own.get("attention.key_length", shared)
    return {"query_pre_attn_scalar": shared if own["block_count"] == largest else width}


_OWN: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": lambda own: _gemma(own, 46),
    "gemma3": _gemma3,
    "phi3": lambda own: {"sliding_window": own.get("attention.sliding_window") or None},  # which llama.cpp passes over
    # How llama.cpp weighs the experts of each.
    "olmoe": lambda own: {"norm_topk_prob": False, "clip_qkv": None},
    "qwen2moe": lambda own: {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3moe": lambda own: {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt2": lambda own: {"n_positions": own.get("context_length", 1024), "n_inner": own.get("feed_forward_length")},
}
_LIKE = {"olmoe": "qwen2", "qwen2moe": "qwen2", "qwen3moe": "qwen3"}  # but for their experts, which follow
_EXPERTS: dict[str, str | None] = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_ALSO: dict[str, dict[str, str | None]] = {
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"rope.freq_base_swa": None, "final_logit_softcapping": "final_logit_softcapping"},
    "olmoe": _EXPERTS,
    "phi3": {"attention.sliding_window": None},
    "qwen2moe": _EXPERTS | {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None},
    "qwen3moe": _EXPERTS | {"expert_feed_forward_length": None},
    "stablelm": {"use_parallel_residual": "use_parallel_residual"},
}
# Widths of experts, which an older file says by its tensors alone.
_WIDTHS: dict[str, dict[str, str]] = {
    "qwen2moe": {
        "moe_intermediate_size": "blk.0.ffn_down_exps.weight",
        "shared_expert_intermediate_size": "blk.0.ffn_down_shexp.weight",
    },
    "qwen3moe": {"moe_intermediate_size": "blk.0.ffn_down_exps.weight"},
}
# Fields of configs that say whether layers have a bias, which the file says by holding one.
_BIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": ("blk.0.attn_q.bias", "blk.0.attn_output.bias"), "mlp_bias": ("blk.0.ffn_up.bias",)},
    "qwen2moe": {"qkv_bias": ("blk.0.attn_q.bias",)},
    "stablelm": {"use_qkv_bias": ("blk.0.attn_q.bias",)},
}
