"""Layers that other libraries have packed, as a frozen base: what one has to say so that it takes adapters.

A foreign layer multiplies by itself (it is called) and says its dense weight. That is enough: LoRA adds to its product, DoRA reads its
norms, merging makes an ordinary dense layer of it. minilora reads no codes of other libraries. Known are bitsandbytes' ``Linear4bit`` and
``Linear8bitLt``, HQQ's ``HQQLinear``, and torch's ``Linear`` with a weight of torchao; ``register_foreign`` makes another one known.
Next file: ``linear/layers.py``.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.errors import StateError

__all__ = ["Foreign", "foreign_of", "register_foreign"]


@dataclass(frozen=True)
class Foreign:
    """What one kind of packed layer says; it has ``in_features``, ``out_features`` and ``bias`` as ``nn.Linear`` has.

    Attributes:
        dense: the weight ``[out, in]`` that it multiplies with, in a floating dtype.
        dtype: the dtype that the weight had before it was packed; None where the layer does not know.
        parameter: what the parameter with the packed weight is called.
    """

    dense: Callable[[Any], Tensor]
    dtype: Callable[[Any], torch.dtype | None]
    parameter: str = "weight"


_BY_CLASS: dict[str, Foreign] = {}


def register_foreign(class_name: str, foreign: Foreign) -> None:
    """Make layers of a class (``"module.Class"``, so that it need not be imported) and of its subclasses known."""
    _BY_CLASS[class_name] = foreign
    _of_class.cache_clear()


def foreign_of(layer: object) -> Foreign | None:
    """What is known of a layer of another library; None for every other layer."""
    if (known := _of_class(cast(Any, type(layer)))) is not None:
        return known
    if isinstance(layer, nn.Linear) and type(layer._parameters.get("weight")).__module__.startswith("torchao."):
        return _TORCHAO
    return None


@functools.cache
def _of_class(kind: Any) -> Foreign | None:
    return next(
        (known for each in kind.__mro__ if (known := _BY_CLASS.get(f"{each.__module__}.{each.__qualname__}"))), None
    )


def _four_bits(layer: Any) -> Tensor:
    functional: Any = sys.modules["bitsandbytes"].functional  # imported already, for here is a layer of it
    state = _state(layer)
    codes = layer.weight.data
    if getattr(state, "packing_format_for_cpu", False):  # packed once more for a processor that multiplies bf16
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes.clone(), copy.deepcopy(state))
    return functional.dequantize_4bit(codes, state)


def _state(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise StateError(
            f"a {type(layer).__name__} holds no packed weight yet; bitsandbytes packs it when it is moved: layer.to('cpu') or .to('cuda')"
        )
    return state


def _eight_bits(layer: Any) -> Tensor:
    scales = layer.state.SCB if layer.state.SCB is not None else getattr(layer.weight, "SCB", None)
    if layer.weight.dtype != torch.int8 or scales is None:
        raise StateError(
            f"a {type(layer).__name__} holds no packed weight ({layer.weight.dtype}); make it with has_fp16_weights=False and move it"
        )
    return layer.weight.data * (scales.to(layer.weight.device).float()[:, None] / 127)


def _dtype_of_bias(layer: Any) -> torch.dtype | None:
    return None if layer.bias is None else layer.bias.dtype


register_foreign("bitsandbytes.nn.modules.Linear4bit", Foreign(_four_bits, lambda layer: _state(layer).dtype))
register_foreign("bitsandbytes.nn.modules.Linear8bitLt", Foreign(_eight_bits, _dtype_of_bias))
register_foreign(
    "hqq.core.quantize.HQQLinear",
    Foreign(lambda layer: layer.dequantize(), lambda layer: layer.compute_dtype, parameter="W_q"),
)
_TORCHAO = Foreign(lambda layer: layer.weight.dequantize(), lambda layer: layer.weight.dtype)
