"""Optimizer groups for LoRA: LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4) trains B with a higher rate than A."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from minilora.errors import ConfigError, StateError

__all__ = ["lora_plus_groups"]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: B (and other output-side factors) at ``lr * ratio``, everything else that trains at ``lr``.

    With Adam, no weight decay and no clipping of the global norm this equals plain LoRA with A drawn ``sqrt(ratio)`` times as large and
    the rate ``lr * sqrt(ratio)``.

    Raises:
        ConfigError: a rate or ratio that is not > 0. StateError: nothing trains.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"{name}={value!r}: wanted a number > 0; LoRA+ uses ratio=16")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise StateError("no parameter requires grad, so nothing would train; inject an adapter first")
    # On an embedding A holds one column a token and B projects it: the output side is B there as well.
    fast = [
        parameter for name, parameter in named if name.rsplit(".", 1)[-1] in ("lora_B", "lora_embedding_B", "lora_bias")
    ]
    taken = {id(parameter) for parameter in fast}
    slow = [parameter for _, parameter in named if id(parameter) not in taken]
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [group for group in groups if group["params"]]
