"""What a GGUF file says of a model's architecture, from its config of transformers: one line of a table for each entry.

llama.cpp computes each architecture in one way. What a config may ask for beside it (another activation, another rule for the experts,
a window where llama.cpp has none) has no entry, and llama.cpp would pass over it in silence; ``Written.fixed`` lists such fields with the
value that llama.cpp computes with (``hf/gguf_limits.py`` has what is common to all). Next file: ``hf/gguf_vocabulary.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.validate import shown
from minilora.gguf.names import TESTED
from minilora.hf.gguf_limits import (
    Asked,
    Granted,
    head_dim,
    longest,
    other_value,
    refuse_other,
    refuse_unasked,
    rope_of,
)

__all__ = ["WRITTEN", "Written", "architecture_of", "metadata"]

Entry = str | Callable[[Any], Any]
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _partial(config: Any) -> int:
    return int(rope_of(config).get("partial_rotary_factor", 1.0) * head_dim(config))


def _near_theta(config: Any) -> float:
    """Of Gemma 3's layers that see little of the text, whose angles llama.cpp never stretches."""
    near = (config.rope_parameters or {}).get("sliding_attention", {})
    if (kind := near.get("rope_type", "default")) != "default":
        raise CheckpointError(
            f"{config.model_type}: rotary angles of the kind {shown(kind)} in layers with a window are none of llama.cpp's (default)"
        )
    return float(near.get("rope_theta", 10_000.0))


@dataclass(frozen=True)
class Written:
    """How one architecture is written.

    Attributes:
        entries: ending of an entry to the config's field, or to what makes its value of the config; None and 0.0 are left out.
        fixed: fields to the values that llama.cpp computes with; a config that has no such field is right.
        shared: whether llama.cpp takes the width of a head for what they share. partial: whether a part of a head can turn.
    """

    entries: dict[str, Entry]
    fixed: Granted = field(default_factory=dict)
    shared: bool = False
    partial: bool = False


_COMMON: dict[str, Entry] = {
    "context_length": longest,
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": lambda c: getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
    "rope.freq_base": lambda c: float(rope_of(c).get("rope_theta", 10_000.0)),
    "rope.dimension_count": _partial,
    "vocab_size": "vocab_size",
}
_HEADS: dict[str, Entry] = {"attention.key_length": head_dim, "attention.value_length": head_dim}
_NORM: dict[str, Entry] = {_RMS: "rms_norm_eps"}
_EXPERTS: dict[str, Entry] = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": lambda c: getattr(c, "moe_intermediate_size", None),
    "expert_shared_feed_forward_length": lambda c: getattr(c, "shared_expert_intermediate_size", None),
}
_FRACTIONS = ("epsilon", "scale", "softcapping", "freq_base", "freq_base_swa")  # also where a config has a whole number
_SILU: Granted = {"hidden_act": ("silu",)}
_GELU: Granted = {
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
    "hidden_activation": ("gelu_pytorch_tanh", "gelu", None),
}
_NO_WINDOW: Granted = {"use_sliding_window": (False,)}
_NO_BIAS: Granted = {"attention_bias": (False, None)}  # q, k, v could have one there, o has none
_OWN_HEAD: Granted = {"tie_word_embeddings": (False,)}
_TIED: Granted = {"tie_word_embeddings": (True,)}
_BIASES: Granted = {"attention_bias": (False, True), "mlp_bias": (False, True)}  # tensors more, which llama.cpp adds
_SPARSE: Granted = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
_CAUSAL: Granted = {"use_bidirectional_attention": (False, None)}
_LLAMA = Written(_COMMON | _HEADS | _NORM, _SILU | _BIASES)
_SCALES: dict[str, Entry] = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_GEMMA2: dict[str, Entry] = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_GPT2: dict[str, Entry] = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": lambda c: c.n_inner or 4 * c.n_embd,
    "attention.head_count": "n_head",
    _LAYER: "layer_norm_epsilon",
}
_FALCON: dict[str, Entry] = {
    **_COMMON,
    "context_length": lambda c: getattr(c, "max_position_embeddings", None) or 2048,
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count_kv": lambda c: min(c.num_kv_heads, 1 if c.multi_query else c.num_kv_heads),
    _LAYER: "layer_norm_epsilon",
}

WRITTEN: dict[str, Written] = {
    "llama": _LLAMA,
    "mistral": Written(_LLAMA.entries, _SILU),
    "smollm3": Written(_LLAMA.entries, _SILU | _NO_WINDOW | _NO_BIAS | {"mlp_bias": (False,)}),
    "granite": Written(_LLAMA.entries | _SCALES, _SILU | _BIASES),
    "qwen2": Written(_LLAMA.entries, _SILU | _NO_WINDOW, shared=True),
    "qwen3": Written(_LLAMA.entries, _SILU | _NO_WINDOW | _NO_BIAS),
    "qwen2_moe": Written(
        _LLAMA.entries | _EXPERTS,
        _SILU | _NO_WINDOW | _SPARSE | _OWN_HEAD | {"norm_topk_prob": (False,), "qkv_bias": (True, False)},
        shared=True,
    ),
    "qwen3_moe": Written(_LLAMA.entries | _EXPERTS, _SILU | _NO_WINDOW | _NO_BIAS | _SPARSE | {"norm_topk_prob": (True,)}),
    "olmoe": Written(
        _LLAMA.entries | _EXPERTS, _SILU | _NO_BIAS | _OWN_HEAD | {"norm_topk_prob": (False,), "clip_qkv": (None,)}, shared=True
    ),
    "olmo2": Written(_LLAMA.entries, _SILU | _NO_BIAS | _OWN_HEAD, shared=True),
    "gemma": Written(_LLAMA.entries, _GELU | _NO_BIAS | _TIED | _CAUSAL),
    "gemma2": Written(_LLAMA.entries | _GEMMA2, _GELU | _NO_BIAS | _TIED | _CAUSAL),
    "gemma3_text": Written(
        _LLAMA.entries | {"attention.sliding_window": "sliding_window", "rope.freq_base_swa": _near_theta},
        _GELU | _NO_BIAS | _CAUSAL | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    ),
    "phi3": Written(
        {
            **_COMMON,
            **_NORM,
            "rope.scaling.original_context_length": "original_max_position_embeddings",
            "attention.sliding_window": lambda c: c.sliding_window or 0,
        },
        _SILU,
        shared=True,
        partial=True,
    ),
    "phi": Written(_COMMON | {_LAYER: "layer_norm_eps"}, _GELU | _OWN_HEAD | {"qk_layernorm": (False,)}, shared=True, partial=True),
    "starcoder2": Written(_COMMON | {_LAYER: "norm_epsilon"}, _GELU | {"use_bias": (True,)}, shared=True),
    "stablelm": Written(
        _COMMON | {_LAYER: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        _SILU | _OWN_HEAD | {"qk_layernorm": (False,), "use_qkv_bias": (False, True)},
        shared=True,
        partial=True,
    ),
    "cohere": Written(
        _COMMON | {_LAYER: "layer_norm_eps", "logit_scale": "logit_scale"},
        _SILU | _NO_BIAS | _TIED | {"use_qk_norm": (False,)},
        shared=True,
    ),
    "gpt2": Written(
        _GPT2,
        {
            "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        shared=True,
    ),
    "gpt_neox": Written(
        _COMMON
        | {_LAYER: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual", "attention.head_count_kv": "num_attention_heads"},
        _GELU | _OWN_HEAD | {"attention_bias": (True,)},
        shared=True,
        partial=True,
    ),
    "falcon": Written(
        _FALCON | {"tensor_data_layout": lambda c: "jploski"},
        {
            "alibi": (False,), "parallel_attn": (True,), "bias": (False,), "activation": ("gelu",), "new_decoder_architecture": (False,),
            "num_ln_in_parallel_attn": (None, 1),
        },
        shared=True,
    ),
}  # fmt: skip


def architecture_of(config: Any) -> str:
    """What llama.cpp calls the architecture of a config. Raises ``CheckpointError`` for one that is not tested."""
    for name, known in TESTED.items():
        if config.model_type in known.model_types and config.model_type in WRITTEN:
            return name
    raise CheckpointError(
        f"{config.model_type}: no GGUF file is written of this architecture; wanted one of {', '.join(sorted(WRITTEN))}"
    )


def metadata(config: Any) -> dict[str, Any]:
    """Entries of the architecture, by their whole names: whole numbers, fractions, texts and yes or no.

    Raises:
        CheckpointError: the config asks for what llama.cpp does not compute; the message names the field.
    """
    name, asked = architecture_of(config), Asked(config)
    written = WRITTEN[config.model_type]
    refuse_other(asked, written.fixed, written.shared, written.partial)
    found = _scaling(asked)
    for ending, source in written.entries.items():
        value = source(asked) if callable(source) else getattr(asked, source, None)
        if value is not None:
            found[ending] = float(value) if ending.endswith(_FRACTIONS) else value
        if value == 0 and ending.endswith("scale"):
            raise other_value(config, source, value, "0 means none there")
    refuse_unasked(config, asked.fields)
    return {f"{name}.{ending}": value for ending, value in found.items()}


def _scaling(config: Any) -> dict[str, Any]:
    """How rotary angles are stretched: not at all, or evenly."""
    rope = {} if config.model_type == "gpt2" else rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind != "default" and (kind != "llama3" or config.model_type != "llama"):  # which is a tensor there
        raise CheckpointError(
            f"{config.model_type}: rotary angles of the kind {shown(kind)} are not written; use llama.cpp's converter"
        )
    return {}
