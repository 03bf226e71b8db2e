"""LoRA on an embedding: ``E[token] + s * (B A)^T [token]``, with A ``[r, tokens]`` and B ``[dimension, r]`` (as loralib and PEFT).

A starts at zero and B random, the other way round from a linear layer, so that the rows of the table start unchanged. A config whose
linear layers start from a part of their weight ("pissa", "olora", "orthogonal") starts an embedding in this same way: so does PEFT, and
its files mean it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.linear.layers import compute_dtype, embed_scale
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig


@register("orthogonal", on="embedding")
@register("olora", on="embedding")
@register("pissa", on="embedding")
@register("corda", on="embedding")
@register("lora_ga", on="embedding")
@register("lora", on="embedding")
class LoRAEmbedding(Adapter):
    """An embedding with a low-rank update; dropout does not apply to token ids.

    Attributes:
        lora_embedding_A: ``[r, tokens]`` fp32, trained. lora_embedding_B: ``[dimension, r]`` fp32, trained.
    """

    file_names: ClassVar[dict[str, str]] = {
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
    }

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.r, self.scaling = config.for_module(path)[0], config.scaling(path)
        self.padding_idx: int | None = self.innermost.padding_idx  # type: ignore[assignment]
        kind, place = compute_dtype(self.innermost), self.weight.device
        A, B = self.initial_factors(config)
        self.lora_embedding_A = nn.Parameter(A.to(kind).to(place, torch.float32))
        self.lora_embedding_B = nn.Parameter(B.to(kind).to(place, torch.float32))

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor]:
        """Start values of A and B, drawn from torch's generator in PEFT's order."""
        A = torch.randn(self.r, self.out_features, dtype=torch.float32, device="cpu")
        B = torch.randn(self.in_features, self.r, dtype=torch.float32, device="cpu")
        return (torch.zeros_like(A), torch.randn_like(B)) if config.init_lora_weights else (A, B)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.base_layer(x)
        return rows + (self.update(x) * embed_scale(self.innermost)).to(rows.dtype)

    def update(self, x: Tensor) -> Tensor:
        """``scaling * (B A)^T [token]`` in fp32."""
        thin = F.embedding(x, self.lora_embedding_A.T, self.padding_idx)  # whose column gets no gradient
        return thin @ self.lora_embedding_B.T * self.scaling

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).T

    def as_lora(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_B.float().T, self.scaling * self.lora_embedding_A.float().T

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class Tied(Adapter):
    """The output head that shares its weight with an adapted embedding, and so its update; it trains nothing of its own."""

    targeted: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module, source: Adapter) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.in_features, self.out_features = source.in_features, source.out_features
        self.__dict__["source"] = source  # not a child: its parameters already belong to the embedding's slot

    @property
    def source(self) -> Any:
        """The embedding's adapter."""
        return self.__dict__["source"]

    def delta_weight(self) -> Tensor:
        return self.source.delta_weight()


class TiedHead(Tied):
    """A head tied to an embedding with LoRA. Its file names are views of the embedding's factors, which PEFT saves a second time."""

    file_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    @property
    def lora_A(self) -> Tensor:
        """The embedding's B, ``[r, dimension]``."""
        return self.source.lora_embedding_B.T

    @property
    def lora_B(self) -> Tensor:
        """The embedding's A, ``[tokens, r]``."""
        return self.source.lora_embedding_A.T

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_A.to(x.dtype))
        return self.base_layer(x) + F.linear(thin, self.lora_B.to(x.dtype)) * self.source.scaling

    def as_lora(self) -> tuple[Tensor, Tensor]:
        return self.source.as_lora()


class TiedEmbedding(Tied):
    """Another embedding over the same table (an encoder's and a decoder's) as one with LoRA; its factors are that one's."""

    file_names: ClassVar[dict[str, str]] = LoRAEmbedding.file_names

    @property
    def lora_embedding_A(self) -> Tensor:
        """The other's A, ``[r, tokens]``."""
        return self.source.lora_embedding_A

    @property
    def lora_embedding_B(self) -> Tensor:
        """The other's B, ``[dimension, r]``."""
        return self.source.lora_embedding_B

    def forward(self, x: Tensor) -> Tensor:
        rows = self.base_layer(x)
        return rows + (self.source.update(x) * embed_scale(self.innermost)).to(rows.dtype)

    def as_lora(self) -> tuple[Tensor, Tensor]:
        return self.source.as_lora()
