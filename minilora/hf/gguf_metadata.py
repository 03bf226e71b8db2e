"""What a GGUF file says of a model's architecture, from its config of transformers: one line of a table for each entry.

llama.cpp computes each architecture in one way. What a config may ask for beside it (another activation, another rule for the experts,
a window where llama.cpp has none) has no entry, and llama.cpp would pass over it in silence; ``Written.fixed`` lists such fields with the
value that llama.cpp computes with, and a config of another value is refused by the field's name. Next file: ``hf/gguf_vocabulary.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.validate import shown
from minilora.gguf.names import TESTED

__all__ = ["WRITTEN", "Written", "architecture_of", "metadata"]

Entry = str | Callable[[Any], Any]
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    found = config.rope_parameters or {}
    return found.get("full_attention", found)


def _partial(config: Any) -> int:
    return int(_rope(config).get("partial_rotary_factor", 1.0) * _head_dim(config))


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
    """

    entries: dict[str, Entry]
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)


_COMMON: dict[str, Entry] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": lambda c: getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
    "rope.freq_base": lambda c: float(_rope(c).get("rope_theta", 10_000.0)),
    "rope.dimension_count": _partial,
    "vocab_size": "vocab_size",
}
_HEADS: dict[str, Entry] = {"attention.key_length": _head_dim, "attention.value_length": _head_dim}
_NORM: dict[str, Entry] = {_RMS: "rms_norm_eps"}
_EXPERTS: dict[str, Entry] = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": lambda c: getattr(c, "moe_intermediate_size", None),
    "expert_shared_feed_forward_length": lambda c: getattr(c, "shared_expert_intermediate_size", None),
}
_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_GELU: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
    "hidden_activation": ("gelu_pytorch_tanh", "gelu", None),
}
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False, None)}  # q, k, v could have one there, o has none
_OWN_HEAD: dict[str, tuple[Any, ...]] = {"tie_word_embeddings": (False,)}
_LLAMA = Written(_COMMON | _HEADS | _NORM, _SILU | {"mlp_bias": (False,)})
_QWEN = Written(_LLAMA.entries, _SILU | _NO_WINDOW | _NO_BIAS)
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
    "attention.head_count_kv": lambda c: c.num_kv_heads if c.new_decoder_architecture or not c.multi_query else 1,
    _LAYER: "layer_norm_epsilon",
}

WRITTEN: dict[str, Written] = {
    "llama": _LLAMA,
    "mistral": Written(_LLAMA.entries, _SILU | {"sliding_window": (None,)}),
    "smollm3": Written(_LLAMA.entries, _SILU | _NO_WINDOW | _NO_BIAS | {"mlp_bias": (False,)}),
    "granite": Written(_LLAMA.entries | _SCALES, _SILU | {"mlp_bias": (False,)}),
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "qwen2_moe": Written(
        _LLAMA.entries | _EXPERTS,
        _SILU | _NO_WINDOW | {"norm_topk_prob": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
    "qwen3_moe": Written(
        _LLAMA.entries | _EXPERTS,
        _SILU | _NO_WINDOW | _NO_BIAS | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
    "olmoe": Written(_LLAMA.entries | _EXPERTS, _SILU | _NO_BIAS | {"norm_topk_prob": (False,), "clip_qkv": (None,)}),
    "olmo2": Written(_LLAMA.entries, _SILU | _NO_BIAS | _OWN_HEAD),
    "gemma": Written(_LLAMA.entries, _GELU | _NO_BIAS),
    "gemma2": Written(_LLAMA.entries | _GEMMA2, _GELU | _NO_BIAS),
    "gemma3_text": Written(
        _LLAMA.entries | {"attention.sliding_window": "sliding_window", "rope.freq_base_swa": _near_theta},
        _GELU | _NO_BIAS
        | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
    ),
    "phi3": Written(
        {
            **_COMMON,
            **_NORM,
            "rope.scaling.original_context_length": "original_max_position_embeddings",
            "attention.sliding_window": lambda c: c.sliding_window or 0,
        },
        _SILU,
    ),
    "phi": Written(_COMMON | {_LAYER: "layer_norm_eps"}, _GELU | _OWN_HEAD | {"qk_layernorm": (False,)}),
    "starcoder2": Written(_COMMON | {_LAYER: "norm_epsilon"}, _GELU | {"sliding_window": (None,), "use_bias": (True,)}),
    "stablelm": Written(
        _COMMON | {_LAYER: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        _SILU | _OWN_HEAD | {"qk_layernorm": (False,)},
    ),
    "cohere": Written(
        _COMMON | {_LAYER: "layer_norm_eps", "logit_scale": "logit_scale"},
        _SILU | _NO_BIAS | {"use_qk_norm": (False,)},
    ),
    "gpt2": Written(
        _GPT2,
        {
            "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
    "gpt_neox": Written(
        _COMMON | {_LAYER: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        _GELU | _OWN_HEAD | {"attention_bias": (True,)},
    ),
    "falcon": Written(
        _FALCON | {"tensor_data_layout": lambda c: "jploski"},
        {"alibi": (False,), "parallel_attn": (True,), "bias": (False,), "activation": ("gelu",), "new_decoder_architecture": (False,)},
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
    name = architecture_of(config)
    written = WRITTEN[config.model_type]
    for entry, right in written.fixed.items():
        if (value := getattr(config, entry, right[0])) not in right:
            said = f"{entry}={shown(value)}"
            raise CheckpointError(
                f"{config.model_type}: its config has {said}, which llama.cpp does not compute ({shown(right[0])})"
            )
    _refuse_layers(config)
    found = _scaling(config)
    for ending, source in written.entries.items():
        value = source(config) if callable(source) else getattr(config, source, None)
        if value is not None:
            found[ending] = value
    return {f"{name}.{ending}": value for ending, value in found.items()}


def _scaling(config: Any) -> dict[str, Any]:
    """How rotary angles are stretched: not at all, or evenly."""
    rope = {} if config.model_type == "gpt2" else _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind != "default" and (kind != "llama3" or config.model_type != "llama"):  # which is a tensor there
        raise CheckpointError(
            f"{config.model_type}: rotary angles of the kind {shown(kind)} are not written; use llama.cpp's converter"
        )
    return {}


def _refuse_layers(config: Any) -> None:
    """What llama.cpp takes for granted of which layer does what, and of how scores are scaled."""
    kind = config.model_type
    if kind == "smollm3" and list(config.no_rope_layers) != [
        int((n + 1) % 4 != 0) for n in range(config.num_hidden_layers)
    ]:
        raise CheckpointError(
            f"{kind}: its config has no_rope_layers={config.no_rope_layers}; llama.cpp leaves out every fourth"
        )
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    if kind == "phi3" and window and window < longest:
        raise CheckpointError(
            f"{kind}: its config has sliding_window={window} of {longest} tokens; llama.cpp attends to all"
        )
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if kind == "gemma2" and not getattr(config, cap):
            raise CheckpointError(f"{kind}: its config has {cap}={shown(getattr(config, cap))}; llama.cpp always caps")
    period = {"gemma2": 2, "gemma3_text": 6}.get(kind)
    if period is None:
        return
    wanted = ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(config.num_hidden_layers)]
    if list(config.layer_types) != wanted:
        raise CheckpointError(
            f"{kind}: its config has other layer_types than llama.cpp, where every {period}th attends to all"
        )
    if config.query_pre_attn_scalar != _head_dim(config):
        raise CheckpointError(
            f"{kind}: its config has query_pre_attn_scalar={config.query_pre_attn_scalar}; llama.cpp takes head_dim, {_head_dim(config)}"
        )
