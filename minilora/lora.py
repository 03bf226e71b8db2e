"""LoRA, the lesson (Hu et al. 2021, arXiv 2106.09685, section 4.1, equation 3).

A frozen weight ``W [out, in]`` gets a thin update beside it::

    x ----------------- W ----------------- + --> y          y = W x + (lora_alpha / r) * B A x
      \\-- dropout -- A [r, in] -- B [out, r] --/             trainable: r * (in + out) numbers instead of in * out

``B`` starts at zero, so at the first step the layer is exactly what it was; ``A`` starts random, so that ``B`` gets a gradient.
Next file: ``adapter.py``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapter import Adapter, register
from minilora.config import LoraConfig
from minilora.errors import StateError
from minilora.fused import lora_linear
from minilora.layers import calls_only_forward, carries, compute_dtype, frozen_weight


@register("lora")
class LoRALinear(Adapter):
    """A linear layer with a low-rank update.

    Attributes:
        lora_A: ``[r, in]`` fp32, trained. lora_B: ``[out, r]`` fp32, trained. lora_bias: ``[out]`` fp32, trained, or None.
        scaling: ``lora_alpha / r``; ``lora_alpha / sqrt(r)`` with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
    """

    lora_bias: nn.Parameter | None
    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
    }

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.r, self.scaling = config.for_module(path)[0], config.scaling(path)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        # Adapters are kept in fp32, after being drawn in the base layer's dtype, as PEFT does.
        kind, place = compute_dtype(self.innermost), self.weight.device
        A, B, bias = self.initial_factors(config)
        self.lora_A, self.lora_B = _fp32(A, kind, place), _fp32(B, kind, place)
        self.register_parameter("lora_bias", None if bias is None else _fp32(bias, kind, place))

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        """Start values of A, B and the bias on B, drawn from torch's generator in PEFT's order, so that one seed gives both the same A.

        True: A uniform in +-1/sqrt(in) (kaiming, a = sqrt(5)), B = 0. "gaussian": A normal with std 1/r, B = 0. False: both random.
        """
        A = nn.Linear(self.in_features, self.r, bias=False).weight  # both constructors draw, as they do in PEFT
        up = nn.Linear(self.r, self.out_features, bias=config.lora_bias)
        B, bias = up.weight, up.bias if config.lora_bias else None
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        elif config.init_lora_weights is True:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights:
            nn.init.zeros_(B)
            if bias is not None:
                nn.init.zeros_(bias)
        return A, B, bias

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain() and carries(self.base_layer, x):  # the same in one function: ``fused.py``
            p = self.lora_dropout.p if self.lora_dropout.training and isinstance(self.lora_dropout, nn.Dropout) else 0.0
            weight = frozen_weight(self.base_layer)
            return lora_linear(x, weight, self._whole_bias(), self.lora_A, self.lora_B, self.scaling, p)
        return self.base_layer(x) + self.update(self.lora_dropout(x))

    def _is_plain(self) -> bool:
        """Whether the update is this class's formula, and nobody listens to the dropout."""
        return type(self).update is LoRALinear.update and calls_only_forward(self.lora_dropout)

    def _whole_bias(self) -> Tensor | None:
        """The base layer's bias and the update's."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        if self.lora_bias is None:
            return bias
        return self.scaling * self.lora_bias if bias is None else bias + self.scaling * self.lora_bias

    def update(self, x: Tensor) -> Tensor:
        """``scaling * B A x`` in the dtype that flows through the layer."""
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype)
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype), bias) * self.scaling

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def delta_bias(self) -> Tensor | None:
        return None if self.lora_bias is None else self.scaling * self.lora_bias.float()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to no update at all."""
        self.lora_B.zero_()
        if self.lora_bias is not None:
            self.lora_bias.zero_()

    def as_lora(self) -> tuple[Tensor, Tensor]:
        if self.lora_bias is not None:
            raise StateError("lora_bias: the update changes the bias too, which a plain LoRA cannot; merge it instead")
        return self.lora_A.float(), self.scaling * self.lora_B.float()

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def _fp32(values: Tensor, drawn_in: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(values.detach().to(drawn_in).to(device, torch.float32).contiguous())
