"""OLoRA (Bueyuekakyuez 2024, arXiv 2406.01775, algorithm 1): start from the first r columns of the QR decomposition of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.variants.residual import ResidualLoRA


@register("olora")
class OLoRALinear(ResidualLoRA):
    """``W = Q R``; ``B`` is the first r columns of Q (orthonormal), ``A`` the first r rows of R."""

    def part_of(self, weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)
        return R[: self.r], Q[:, : self.r]
