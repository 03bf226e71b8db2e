"""What llama.cpp takes for granted of a model: a config that asks for anything else is refused by the field's name.

llama.cpp computes each architecture in one way, and finds the sides of its tensors from a few entries. Of what a config may ask for beside
it, a file that says so is not opened (heads wider than what they share), and one that does not is computed otherwise in silence. Two things
keep that out: a table of fields with the values that llama.cpp computes with, and the rule that a field which nobody reads has to be at its
default. Next file: ``hf/gguf_metadata.py``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.validate import shown

__all__ = [
    "Asked",
    "Granted",
    "head_dim",
    "longest",
    "other_value",
    "refuse_other",
    "refuse_unasked",
    "rope_of",
    "shortened",
]

_MOST = {"num_hidden_layers": 512, "num_experts": 512}  # llama.cpp's LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS
# Fields that change no logit of a model that is only asked, or that the weights show by their names.
_WITHOUT_MEANING = re.compile(
    r".*_token_id|.*(dropout|pdrop)|summary_.*|initializer_range|use_cache|output_router_logits|router_aux_loss_coef|max_window_layers"
    r"|pretraining_tp|reorder_and_upcast_attn|is_decoder|tie_word_embeddings|no_rope_layer_interval|vocab_size"
)
_NO_WINDOW = ("mistral", "phi3", "starcoder2")  # architectures without one in llama.cpp
_FULL = "full_attention"
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # of their layers, every so many attend to all
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of 27B, whose queries llama.cpp scales by what heads share


class Asked:
    """A config that remembers which of its fields were asked for."""

    def __init__(self, config: Any) -> None:
        self._config, self.fields = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._config, "attribute_map", {})
        self.fields |= {name, own.get(name, name)}
        return getattr(self._config, name)


Granted = dict[str, tuple[Any, ...]]  # fields to the values that llama.cpp computes with, the usual one first


def refuse_other(config: Any, granted: Granted, shared: bool, partial: bool) -> None:
    """Raise ``CheckpointError`` for a field that asks for what llama.cpp does not compute.

    Args:
        shared: whether heads have the width that they share, ``hidden_size / heads``, and no other.
        partial: whether a part of a head can turn, in llama.cpp and in transformers.
    """
    for name, right in granted.items():
        if (value := getattr(config, name, right[0])) not in right:
            raise other_value(config, name, value, right[0])
    width = config.hidden_size // config.num_attention_heads
    if shared and head_dim(config) != width:
        raise other_value(config, "head_dim", head_dim(config), width)
    for rope in _ropes(config):
        if not partial and (turned := rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise other_value(config, "partial_rotary_factor", turned, 1.0)
    for name, most in _MOST.items():
        if (count := getattr(config, name, 0)) > most:
            raise other_value(config, name, count, f"at most {most}")
    _refuse_layers(config)


def refuse_unasked(config: Any, asked: set[str]) -> None:
    """Raise ``CheckpointError`` for a field of this kind of config that nobody asked for, and that is not at its default."""
    for name, parameter in inspect.signature(type(config).__init__).parameters.items():
        if parameter.default is parameter.empty or name in asked or _WITHOUT_MEANING.fullmatch(name):
            continue
        if name not in _every_model() and (value := getattr(config, name, parameter.default)) != parameter.default:
            raise other_value(config, name, value, parameter.default)


def _every_model() -> set[str]:
    """Fields that all configs have."""
    from transformers import PreTrainedConfig

    return set(inspect.signature(PreTrainedConfig.__init__).parameters)


def other_value(config: Any, name: Any, found: Any, wanted: Any) -> CheckpointError:
    """The error for a field of a value that llama.cpp does not compute with."""
    right = wanted if isinstance(wanted, str) and " " in wanted else shown(wanted)
    return CheckpointError(
        f"{config.model_type}: its config has {name}={shown(found)}, which llama.cpp does not compute ({right}); merge into a folder "
        "and serve that by another program"
    )


# ---- what a config says of heads, angles and windows


def head_dim(config: Any) -> int:
    """Numbers of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> Mapping[str, Any]:
    """How the layers that attend to all turn."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(_FULL, found)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    found = getattr(config, "rope_parameters", None) or {}
    return [each for each in found.values() if isinstance(each, Mapping)] or [found]


def longest(config: Any) -> int | None:
    """Tokens of a text for which llama.cpp computes what the model does: all, or those of a window that it passes over.

    llama.cpp attends to the whole text in these architectures (it says so itself when it opens a Phi-3), and its converter writes the
    model's whole context all the same. Up to the window that is the model, number by number; beyond it no longer. So a file written here
    claims no more than the window.
    """
    context, window = getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None)
    return min(context, window) if context and window and config.model_type in _NO_WINDOW else context


def shortened(config: Any) -> str:
    """A sentence for who writes a file whose context is its window; empty for every other."""
    if longest(config) == (whole := getattr(config, "max_position_embeddings", None)):
        return ""
    said = f"says a context of {longest(config):,} tokens, its window, and not {whole:,}"
    return f"{said}: beyond it llama.cpp attends to more than the model does"


def _refuse_layers(config: Any) -> None:
    """What llama.cpp takes for granted of which layer does what, and of how scores are scaled."""
    kind, count = config.model_type, config.num_hidden_layers
    rotary = [int((n + 1) % 4 != 0) for n in range(count)]
    if kind == "smollm3" and list(config.no_rope_layers) != rotary:
        raise other_value(config, "no_rope_layers", config.no_rope_layers, "every fourth is left out")
    if kind == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise other_value(config, "num_key_value_heads", config.num_key_value_heads, config.num_attention_heads)
    if kind == "cohere" and count >= 64:  # llama.cpp then wants norms of queries and keys
        raise other_value(config, "num_hidden_layers", count, "at most 63")
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if kind == "gemma2" and not getattr(config, cap):
            raise other_value(config, cap, getattr(config, cap), "it always caps")
    period = _PERIOD.get(kind)
    wanted = ["sliding_attention" if period and (n + 1) % period else _FULL for n in range(count)]
    if list(getattr(config, "layer_types", None) or wanted) != wanted:
        said = f"every {period}th attends to all" if period else "each attends to all"
        raise other_value(config, "layer_types", config.layer_types, said)
    if kind in _LARGEST:
        largest = count == _LARGEST[kind]
        scale = config.hidden_size // config.num_attention_heads if largest else head_dim(config)
        if config.query_pre_attn_scalar != scale:
            raise other_value(config, "query_pre_attn_scalar", config.query_pre_attn_scalar, scale)
