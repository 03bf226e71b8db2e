"""``peft.functional``: the functions by which other libraries (transformers, diffusers) adapt models that are no ``PeftModel``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of
from minilora.many import adapted
from minilora.peft.base import BaseTunerLayer
from minilora.peft.lora_model import LoraModel
from minilora.peft.mapping import inject_adapter_in_model
from minilora.peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Bring what an adapter trains from fewer bits to fp32; ``autocast_adapter_dtype=False`` leaves it as it is."""
    for value in adapters_of(model).named(adapter_name).values() if autocast_adapter_dtype else ():
        for parameter in own_parameters(value):
            if parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.to(torch.float32)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """Forget an adapter, the last one too; returns the names that are active then, None where no adapter is left.

    ``prefix`` and ``layer_cls`` are PEFT's: every adapter here is a LoRA.
    """
    if list(adapters_of(model).configs) == [adapter_name]:
        adapted.unload(model)
        return None
    adapted.delete_adapter(model, adapter_name)
    return list(adapters_of(model).active)


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type = BaseTunerLayer,
) -> None:
    """Make one adapter, or the sum of several, the active one; frozen with ``inference_mode``. ``layer_cls`` is PEFT's."""
    LoraModel.of(model).set_adapter(adapter_name, inference_mode)


def set_requires_grad(model: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let the parameters of these adapters train, or not."""
    LoraModel.of(model).set_requires_grad(adapter_names, requires_grad)
