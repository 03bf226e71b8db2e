"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454, section 3.1, equation 2): frozen random factors shared by all layers.

    y = W x + diag(b) B diag(d) A x,        trained: d [r] and b [out]; b = 0 and d = 0.1 at the start

One A ``[r, most in]`` and one B ``[most out, r]`` serve all layers, each of which takes the first columns of A and the first rows of B
(PEFT's rule). They are drawn from a key, and stand in the file too if the config says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig
from minilora.lora.vera_config import VeraConfig

__all__ = ["Projections", "VeRALinear", "drawn", "share_projections", "shared_factor"]

_SEED = 0


@dataclass(eq=False)
class Projections:
    """The two frozen matrices of an adapter, fp32: ``A [r, most in]`` and ``B [most out, r]``, and whether a file holds them."""

    A: Tensor
    B: Tensor
    saved: bool


@functools.lru_cache(maxsize=4)
def drawn(key: int, r: int, most_in: int, most_out: int) -> tuple[Tensor, Tensor]:
    """``(A, B)`` from a key, as PEFT draws them: kaiming-uniform, A first, from one generator on the CPU."""
    generator = torch.Generator("cpu").manual_seed(key)

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        empty = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
        return empty.uniform_(-bound, bound, generator=generator)

    return kaiming(r, most_in), kaiming(most_out, r)


@functools.lru_cache(maxsize=64)
def shared_factor(rows: int, columns: int) -> Tensor:
    """What folders of type LORA mean, which minilora wrote before it wrote PEFT's: a matrix for each shape, fp32, kaiming-uniform."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    return (torch.rand(rows, columns, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * math.sqrt(
        6 / columns
    )


@register("vera")
class VeRALinear(Adapter):
    """A linear layer with a vector-based random update.

    Attributes:
        vera_lambda_d: ``[r]`` fp32, trained. vera_lambda_b: ``[out]`` fp32, trained. shared_A, shared_B: frozen, this layer's part.
        projections: what they are parts of; None for an adapter from a folder of type LORA.
    """

    file_names: ClassVar[dict[str, str]] = {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}
    shared_A: Tensor
    shared_B: Tensor
    projections: Projections | None = None

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.r, _ = config.for_module(path)
        place = self.weight.device
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.register_buffer("shared_A", None, persistent=False)
        self.register_buffer("shared_B", None, persistent=False)
        own = config if isinstance(config, VeraConfig) else None
        if own is not None:
            self.key = own.projection_prng_key
            pair = drawn(self.key, self.r, self.in_features, self.out_features)
            self.take(Projections(*pair, own.save_projection))
        else:
            self.shared_A = shared_factor(self.r, self.in_features).to(place)
            self.shared_B = shared_factor(self.out_features, self.r).to(place)
        start = 0.1 if own is None else float(own.d_initial)
        d = torch.full((self.r,), start, dtype=torch.float32, device=place)
        b = torch.zeros(self.out_features, dtype=torch.float32, device=place)
        if own is not None and not own.init_weights:
            d.normal_()
            b.fill_(1)
        self.vera_lambda_d, self.vera_lambda_b = nn.Parameter(d), nn.Parameter(b)

    def take(self, projections: Projections) -> None:
        """Stand on this layer's part of two matrices."""
        place = self.weight.device
        self.projections = projections
        self.shared_A = projections.A[:, : self.in_features].to(place)
        self.shared_B = projections.B[: self.out_features].to(place)

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(self.lora_dropout(x), self.shared_A.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)
        return self.base_layer(x) + F.linear(thin, self.shared_B.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)

    def delta_weight(self) -> Tensor:
        A, B = self.as_lora()
        return B @ A

    def as_lora(self) -> tuple[Tensor, Tensor]:
        A = self.vera_lambda_d[:, None].float() * self.shared_A.float()
        return A, self.vera_lambda_b[:, None].float() * self.shared_B.float()


def share_projections(values: Mapping[str, Any]) -> None:
    """Give the layers of one new adapter parts of the same two matrices, as large as the largest of them asks for."""
    layers = [value for value in values.values() if isinstance(value, VeRALinear) and value.projections is not None]
    if layers:
        first, most_in = layers[0], max(layer.in_features for layer in layers)
        pair = drawn(first.key, first.r, most_in, max(layer.out_features for layer in layers))
        shared = Projections(*pair, first.projections.saved)  # type: ignore[union-attr]
        for layer in layers:
            layer.take(shared)
