"""LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): quantize and factorise in turns, so that ``Q + s B A`` is close to ``W``.

    repeat:  Q = quantize(W - s B A);   s B A = best rank-r part of (W - Q)

PEFT forgets to divide the factors by the scaling ``s``; at lora_alpha = 2 r its correction is then exactly as large as the error that it
leaves. The error need not fall at every turn, so the best turn is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.adapter import register
from minilora.config import LoraConfig, QuantConfig
from minilora.layers import QuantLinear, dense_weight, is_quantized
from minilora.lora import LoRALinear
from minilora.quantize import QuantizedTensor, quantize


def loftq(
    weight: Tensor, config: QuantConfig, r: int, scaling: float, rounds: int = 5, name: str = "weight"
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """``(Q, A [r, in], B [out, r])`` of the best of ``rounds`` turns by the Frobenius norm of ``W - (Q + scaling B A)``.

    Args:
        weight: ``[out, in]``, any floating dtype. config: any format. r, scaling: of the adapter.
    """
    wide = weight.detach().float()
    low = torch.zeros_like(wide)
    best: tuple[float, QuantizedTensor, Tensor, Tensor] | None = None
    for _ in range(rounds):
        packed = quantize(wide - low, config, name)
        U, S, Vh = torch.linalg.svd(wide - packed.dequantize(torch.float32), full_matrices=False)
        root = (S[:r] / scaling).sqrt()
        A, B = root[:, None] * Vh[:r], U[:, :r] * root
        low = scaling * (B @ A)
        error = float((wide - packed.dequantize(torch.float32) - low).norm())
        if best is None or error < best[0]:
            best = (error, packed, A, B)
    assert best is not None  # rounds >= 1 is validated
    return replace(best[1], dtype=weight.dtype), best[2], best[3]


@register("loftq")
class LoftQLinear(LoRALinear):
    """LoRA on a base layer that it quantizes itself: the slot's base becomes a ``QuantLinear``, and ``B A`` makes up for the error.

    At the start the layer is close to the dense one, not equal to its quantized base. On a base that is packed already (a reloaded
    model) it is plain LoRA, whose factors come from the file.
    """

    replaces_base: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        if not is_quantized(base_layer):
            rounds = config.loftq_config.get("loftq_iter", 1)
            weight = dense_weight(base_layer)
            packed, A, B = loftq(weight, QuantConfig(), self.r, self.scaling, rounds, path + ".weight")
            self.base_layer = QuantLinear(packed, base_layer.bias).train(base_layer.training)  # type: ignore[arg-type]
            self.lora_A, self.lora_B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        return super().initial_factors(replace(config, init_lora_weights=True))
