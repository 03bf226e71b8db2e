"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604, section 3): a small matrix R between frozen singular vectors of the weight.

    y = W x + s U_r S_r R V_r^T x,        W = U S V^T,    trained: R [r, r], which starts at zero

So r * r numbers of a layer train, whatever its size, each with its gradient and its state of the optimizer. The paper draws R from
N(0, 1e-5): at zero R gets the same gradient to the first order (neither factor beside it is zero), and the layer is exactly what it was.
The authors' program decomposes ``W^T``, and so has S beside V_r: with any R the same updates, along other scales of R.

``lora_xs_A = V_r^T`` and ``lora_xs_B = U_r S_r`` are in the file beside R. The signs of singular vectors, and the vectors of equal singular
values, are another machine's choice, and an R beside other vectors is another update. They have names of their own: a program that took
them for a plain LoRA would add W to W. ``as_lora`` gives ``(R A, s B)`` to those (``minilora export``).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig


@register("lora_xs")
class LoRAXSLinear(Adapter):
    """A linear layer with a trained matrix between its own largest singular directions.

    Attributes:
        lora_xs_R: ``[r, r]`` fp32, trained. lora_xs_A: ``[r, in]``, lora_xs_B: ``[out, r]``, fp32, frozen.
        scaling: as that of ``LoRALinear``.

    Raises:
        ConfigError: an r above the smaller side of the weight, or a field that means another start or another variant.
    """

    file_names: ClassVar[dict[str, str]] = {name: name for name in ("lora_xs_A", "lora_xs_B", "lora_xs_R")}
    lora_xs_A: Tensor
    lora_xs_B: Tensor

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        _refuse_fields(config)
        super().__init__(base_layer, config, path)
        self.r, self.scaling = config.for_module(path)[0], config.scaling(path)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        A, B = principal_directions(dense_weight(self.innermost), self.r, path)
        self.register_buffer("lora_xs_A", A)
        self.register_buffer("lora_xs_B", B)
        self.lora_xs_R = nn.Parameter(torch.zeros(self.r, self.r, dtype=torch.float32, device=A.device))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(F.linear(self.lora_dropout(x), self.lora_xs_A.to(x.dtype)), self.lora_xs_R.to(x.dtype))
        return self.base_layer(x) + F.linear(thin, self.lora_xs_B.to(x.dtype)) * self.scaling

    def delta_weight(self) -> Tensor:
        A, B = self.as_lora()
        return B @ A

    def as_lora(self) -> tuple[Tensor, Tensor]:
        return self.lora_xs_R.float() @ self.lora_xs_A.float(), self.scaling * self.lora_xs_B.float()

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def principal_directions(weight: Tensor, r: int, path: str = "") -> tuple[Tensor, Tensor]:
    """``(V_r^T [r, in], U_r S_r [out, r])`` in fp32, of the r largest singular values of ``[out, in]``. Raises ``ConfigError``."""
    if r > min(weight.shape):
        raise ConfigError(
            f"{path}: LoRA-XS takes r of the weight's singular directions, and r={r} for a weight of {tuple(weight.shape)}; set "
            f"rank_pattern={{{path!r}: {min(weight.shape)}}} or less"
        )
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return Vh[:r].contiguous(), (U[:, :r] * S[:r]).contiguous()


def _refuse_fields(config: LoraConfig) -> None:
    for name, plain in (("init_lora_weights", True), ("lora_bias", False), ("use_dora", False)):
        if getattr(config, name) != plain:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is for another variant: lora_xs starts from the weight's singular vectors and trains R "
                f"alone; wanted {plain!r}"
            )
    if config.alora_invocation_tokens:
        raise ConfigError("alora_invocation_tokens is for another variant, not for lora_xs; drop one of the two")
