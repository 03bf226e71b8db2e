"""The rest of ``peft.utils.other`` that concerns LoRA."""

from __future__ import annotations

from typing import Any

from torch import nn

from minilora.lora.architectures import DEFAULT_TARGETS
from minilora.peft.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from minilora.qlora.kbit import prepare_model_for_kbit_training
from minilora.store.adapter_files import CONFIG_FILE as CONFIG_NAME
from minilora.store.adapter_files import WEIGHTS_FILE as SAFETENSORS_WEIGHTS_NAME
from minilora.training.precision import cast_mixed_precision_params

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "infer_device",
    "prepare_model_for_kbit_training",
]

WEIGHTS_NAME = "adapter_model.bin"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = DEFAULT_TARGETS


def infer_device() -> str:
    """The kind of accelerator that torch sees, or "cpu"."""
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return kind.type if kind is not None else "cpu"


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A policy for FSDP1: trained leaves apart (they must not share a flat parameter with frozen ones), transformer layers as units."""
    import functools
    import os

    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    def trains_alone(module: nn.Module) -> bool:
        return not list(module.named_children()) and getattr(getattr(module, "weight", None), "requires_grad", False)

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = set(named.split(",")) if named else set(getattr(model, "_no_split_modules", None) or ())
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=trains_alone),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        ],
    )
