"""minilora's own layer with a weight and factors that a case gives: what the reader's functions are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear

__all__ = ["twin"]


def twin(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, trains: bool = False) -> LoRALinear:
    """A ``LoRALinear`` over ``W [out, in]`` with ``A [r, in]`` and ``B [out, r]``; ``trains``: its factors want gradients."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer = LoRALinear(base, LoraConfig(r=len(A), lora_alpha=lora_alpha))
    with torch.no_grad():
        for own, given in ((base.weight, W), (layer.lora_A, A), (layer.lora_B, B)):
            own.copy_(given)
    base.requires_grad_(False)
    return layer.requires_grad_(trains)
