"""LoRA on a router: the small matrix by which a mixture chooses the experts of each token.

Its module reads the matrix and calls no layer, so the update is added to the weight, as on an attention: each call computes
``W + s B A`` (it is ``[experts, in]``, small) and hands it to the module's own function. PEFT adapts it where ``target_parameters``
names it, such as ``mlp.gate.weight``; so does minilora. Next file: ``many/batched.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from minilora.errors import ConfigError
from minilora.linear.layers import put_parameters
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear


@register("lora", on="router")
class LoRARouter(LoRALinear):
    """A router with an update of its matrix.

    Attributes:
        lora_A: ``[r, in]`` fp32, trained. lora_B: ``[experts, r]`` fp32, trained.

    Raises:
        ConfigError: ``lora_dropout`` or ``lora_bias``, which cannot reach a weight that is read.
    """

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        for name, plain in (("lora_dropout", 0.0), ("lora_bias", False)):
            if getattr(config, name) != plain:
                raise ConfigError(
                    f"{path} is a router, whose weight is read and not called: {name}={getattr(config, name)!r} cannot be done there; "
                    f"wanted {plain!r}, or leave the router out"
                )
        super().__init__(base_layer, config, path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the router's own."""
        inner, changed = self.innermost, {"weight": self._whole_weight()}
        if torch.compiler.is_compiling():
            return torch.func.functional_call(inner, changed, args, kwargs)
        alone = copy.copy(inner)
        put_parameters(alone, changed)
        return alone.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What a model asks its router for (how many experts, a correction of scores) is what the router answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
