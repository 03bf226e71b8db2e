"""Orthogonal start (the initialisation that PEFT calls "orthogonal"): A and B both nonzero and yet B A = 0.

With an orthogonal ``Q [r, r]``, A is built on its even rows and B on its odd ones, which are orthogonal to each other. Both factors get
a gradient at the first step, where plain LoRA's A gets none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minilora.errors import ConfigError
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear


@register("orthogonal")
class OrthogonalLoRA(LoRALinear):
    """LoRA that starts from orthogonal halves; the rank is even. Raises ``ConfigError`` for an odd one."""

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        super().initial_factors(config)  # draws what PEFT draws before
        return (*orthogonal_factors(self.r, self.in_features, self.out_features), None)


def orthogonal_factors(r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])``, both random, with ``B A = 0``. Raises ``ConfigError`` for an odd rank."""
    if r % 2:
        raise ConfigError(
            f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead. Set r={r + 1}"
        )
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    Q = torch.linalg.qr(torch.randn(r, r, **plain)).Q
    A = (torch.randn(in_features, r // 2, **plain) @ Q[0::2]).T / 10
    return A, torch.randn(r // 2, out_features, **plain).T @ Q[1::2] / 10
