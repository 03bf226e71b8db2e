"""LoRA, the lesson (Hu et al. 2021, arXiv 2106.09685, section 4.1, equation 3).

A frozen weight ``W [out, in]`` gets a thin update beside it::

    x ----------------- W ----------------- + --> y          y = W x + (lora_alpha / r) * B A x
      \\-- dropout -- A [r, in] -- B [out, r] --/             trainable: r * (in + out) numbers instead of in * out

``B`` starts at zero, so at the first step the layer is exactly what it was; ``A`` starts random, so that ``B`` gets a gradient.
Next file: ``inject.py``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapter import Adapter, register
from minilora.config import LoraConfig
from minilora.layers import compute_dtype


@register("lora")
class LoRALinear(Adapter):
    """A linear layer with a low-rank update.

    Attributes:
        lora_A: ``[r, in]`` fp32, trained. lora_B: ``[out, r]`` fp32, trained.
        scaling: ``lora_alpha / r``; ``lora_alpha / sqrt(r)`` with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
    """

    file_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.r, lora_alpha = config.for_module(path)
        self.scaling = lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A, self.lora_B = initial_factors(self, config)

    def forward(self, x: Tensor) -> Tensor:
        # The adapter is kept in fp32 and computed in the dtype that flows through the layer.
        thin = F.linear(self.lora_dropout(x), self.lora_A.to(x.dtype))
        return self.base_layer(x) + F.linear(thin, self.lora_B.to(x.dtype)) * self.scaling

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def initial_factors(layer: LoRALinear, config: LoraConfig) -> tuple[nn.Parameter, nn.Parameter]:
    """Start values of A and B, drawn from torch's generator in PEFT's order, so that one seed gives both the same A.

    True: A uniform in +-1/sqrt(in) (kaiming, a = sqrt(5)), B = 0. "gaussian": A normal with std 1/r, B = 0. False: both random.
    PEFT draws in the base layer's dtype and then widens to fp32; so does this.
    """
    dtype, device = compute_dtype(layer.innermost), layer.weight.device
    A = nn.Linear(layer.in_features, layer.r, bias=False).weight  # both constructors draw, as they do in PEFT
    B = nn.Linear(layer.r, layer.out_features, bias=False).weight
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / layer.r)
    elif config.init_lora_weights is True:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if config.init_lora_weights:
        nn.init.zeros_(B)
    start = [nn.Parameter(factor.detach().to(dtype).to(device, torch.float32)) for factor in (A, B)]
    return start[0], start[1]
