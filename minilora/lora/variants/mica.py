"""MiCA, minor component adaptation (arXiv 2604.01694): B is what the weight does least, and stays; A starts at zero and trains.

``W = U S V^T``; B is the last r columns of U, those of the smallest singular values, so the update writes into directions that the
layer hardly uses. Of an embedding the weight is the table turned round, ``[dimension, tokens]``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from minilora.errors import ConfigError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.variants.embedding import LoRAEmbedding


@register("mica")
class MiCALinear(LoRALinear):
    """LoRA with a frozen B of minor directions and A = 0. Raises ``ConfigError`` for an r above the smaller side of the weight."""

    fixed: ClassVar[frozenset[str]] = frozenset({"lora_B"})

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        super().initial_factors(config)  # draws what PEFT draws before
        return torch.zeros(self.r, self.in_features), minor_directions(dense_weight(self.innermost), self.r), None


@register("mica", on="embedding")
class MiCAEmbedding(LoRAEmbedding):
    """The same on an embedding."""

    fixed: ClassVar[frozenset[str]] = frozenset({"lora_embedding_B"})

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor]:
        A, _ = super().initial_factors(replace(config, init_lora_weights=False))  # draws what PEFT draws before
        return torch.zeros_like(A), minor_directions(dense_weight(self.innermost).T, self.r)


def minor_directions(weight: Tensor, r: int) -> Tensor:
    """``[out, r]`` fp32: the left singular vectors of the r smallest singular values of ``[out, in]``."""
    if r > min(weight.shape):
        raise ConfigError(
            f"MiCA requires `r` <= min(in_features, out_features), and r={r} for a weight of {tuple(weight.shape)}; "
            f"set r={min(weight.shape)} or less"
        )
    return torch.linalg.svd(weight.float(), full_matrices=False).U[:, -r:].contiguous()
