"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454, section 3.1, equation 2): frozen random factors shared by all layers.

    y = W x + diag(b) B diag(d) A x,        trained: d [r] and b [out]; b = 0 and d = 0.1 at the start

A and B are drawn from a fixed seed, so a file holds the two vectors only.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig

_SEED = 0


@functools.lru_cache(maxsize=64)
def shared_factor(rows: int, columns: int) -> Tensor:
    """The frozen random matrix of a shape, fp32: kaiming-uniform from a fixed seed, the same for every layer and run."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    return (torch.rand(rows, columns, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * math.sqrt(
        6 / columns
    )


@register("vera")
class VeRALinear(Adapter):
    """A linear layer with a vector-based random update.

    Attributes:
        vera_lambda_d: ``[r]`` fp32, trained. vera_lambda_b: ``[out]`` fp32, trained. shared_A, shared_B: frozen, not saved.
    """

    file_names: ClassVar[dict[str, str]] = {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}
    shared_A: Tensor
    shared_B: Tensor

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.r, _ = config.for_module(path)
        place = self.weight.device
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.register_buffer("shared_A", shared_factor(self.r, self.in_features).to(place), persistent=False)
        self.register_buffer("shared_B", shared_factor(self.out_features, self.r).to(place), persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.full((self.r,), 0.1, dtype=torch.float32, device=place))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=torch.float32, device=place))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(self.lora_dropout(x), self.shared_A.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)
        return self.base_layer(x) + F.linear(thin, self.shared_B.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)

    def delta_weight(self) -> Tensor:
        A, B = self.as_lora()
        return B @ A

    def as_lora(self) -> tuple[Tensor, Tensor]:
        A = self.vera_lambda_d[:, None].float() * self.shared_A.float()
        return A, self.vera_lambda_b[:, None].float() * self.shared_B.float()
