"""LoRA on a router: the small matrix by which a mixture chooses the experts of each token.

Its module reads the matrix and calls no layer, so the update is added to the weight, as on an attention: each call computes
``W + s B A`` (it is ``[experts, in]``, small) and hands it to the module's own function. PEFT adapts it where ``target_parameters``
names it, such as ``mlp.gate.weight``; so does minilora. Next file: ``many/batched.py``.
"""

from __future__ import annotations

from torch import nn

from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.variants.read import ReadLoRA, refuse_fields


@register("lora", on="router")
class LoRARouter(ReadLoRA):
    """A router with an update of its matrix.

    Attributes:
        lora_A: ``[r, in]`` fp32, trained. lora_B: ``[experts, r]`` fp32, trained.

    Raises:
        ConfigError: ``lora_dropout`` or ``lora_bias``, which cannot reach a weight that is read.
    """

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        plain = {"lora_dropout": 0.0, "lora_bias": False}
        refuse_fields(config, plain, f"{path} is a router, whose weight is", "leave the router out")
        super().__init__(base_layer, config, path)
