"""What is frozen in half precision, what trains in full: for training with autocast."""

from __future__ import annotations

import torch
from torch import nn

from minilora.errors import ConfigError
from minilora.lora.change import LOCK, Change

__all__ = ["cast_mixed_precision_params"]


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every frozen parameter to ``dtype`` (fp16 or bf16) and every one that trains to fp32; packed codes stay what they are.

    Raises:
        ConfigError: a dtype that is not floating.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: wanted torch.float16 or torch.bfloat16")
    with LOCK, Change() as change:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                change.keep(parameter, "data")
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
