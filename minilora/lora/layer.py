"""LoRA, the lesson (Hu et al. 2021, arXiv 2106.09685, section 4.1, equation 3).

A frozen weight ``W [out, in]`` gets a thin update beside it::

    x ----------------- W ----------------- + --> y          y = W x + (lora_alpha / r) * B A x
      \\-- dropout -- A [r, in] -- B [out, r] --/             trainable: r * (in + out) numbers instead of in * out

``B`` starts at zero, so at the first step the layer is exactly what it was; ``A`` starts random, so that ``B`` gets a gradient.
Next file: ``lora/adapter.py``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.fused import lora_linear
from minilora.linear.layers import calls_only_forward, carries, compute_dtype, frozen_weight
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig


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

    @property
    def thin(self) -> int:
        """How many inputs a row of B has."""
        return self.r

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(A [r, in], B [out, r])`` as they are now, without the scaling, in fp32."""
        return self.lora_A.float(), self.lora_B.float()

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        """Start values of A, B and the bias on B, drawn from torch's generator in PEFT's order, so that one seed gives both the same A.

        True: A uniform in +-1/sqrt(in) (kaiming, a = sqrt(5)), B = 0. "gaussian": A normal with std 1/r, B = 0. False: both random.
        """
        # Drawn one after the other as PEFT's two constructors and its own start value do, whether or not a draw is used.
        A, B = (
            uniform((self.r, self.in_features), self.in_features),
            uniform((self.out_features, self.thin), self.thin),
        )
        bias = uniform((self.out_features,), self.thin) if config.lora_bias else None
        if config.init_lora_weights == "gaussian":
            A.normal_(std=1 / self.r)
        elif config.init_lora_weights is True:
            A = uniform((self.r, self.in_features), self.in_features)
        if config.init_lora_weights:
            B.zero_()
            if bias is not None:
                bias.zero_()
        return A, B, bias

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self._modules["base_layer"]  # nn.Module's own look-up is slow
        dropout: Any = self._modules["lora_dropout"]
        if not self._in_one(base, dropout, x):
            return base(x) + self.update(dropout(x))
        # The same in one function, which keeps less for the backward pass: ``linear/fused.py``.
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        bias = base.bias if self.lora_bias is None else self._whole_bias()
        return lora_linear(x, frozen_weight(base), bias, self.lora_A, self.lora_B, self.scaling, p)

    def _in_one(self, base: Any, dropout: Any, x: Tensor) -> bool:
        """Whether nobody has changed what ``forward`` is made of: its update, its dropout, how the base layer is called."""
        return type(self).update is LoRALinear.update and is_known_dropout(dropout) and carries(base, x)

    def _whole_bias(self) -> Tensor:
        """The base layer's bias and the update's."""
        assert self.lora_bias is not None
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return self.scaling * self.lora_bias if bias is None else bias + self.scaling * self.lora_bias

    def update(self, x: Tensor) -> Tensor:
        """``scaling * B A x`` in the dtype that flows through the layer."""
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype)
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype), bias) * self.scaling

    def delta_weight(self) -> Tensor:
        A, B = self.factors()
        return self.scaling * (B @ A)

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
        A, B = self.factors()
        return A, self.scaling * B

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def is_known_dropout(dropout: Any) -> bool:
    """Whether ``lora_linear`` can drop as this module does; a subclass, another kind or one that drops all is called instead."""
    kind = type(dropout)
    return (kind is nn.Identity or (kind is nn.Dropout and 0 <= dropout.p < 1)) and calls_only_forward(dropout)


def uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Uniform in +-1/sqrt(fan_in), as ``nn.Linear`` starts (kaiming with a = sqrt(5)), rounding included."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound)


def _fp32(values: Tensor, drawn_in: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(values.detach().to(drawn_in).to(device, torch.float32).contiguous())
