"""DoRA on an embedding: magnitude and direction of every column of the table apart, over all tokens (as PEFT does it).

    E' = (E + s (B A)^T) (m / c),   c = column norms of E + s (B A)^T, held constant in the backward pass;  m = column norms of E

A table is ``[tokens, dimension]``, so its columns are what the rows of a linear weight are: the outputs. The norms come from the same
formula as a linear layer's, without the dense sum.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.layers import compute_dtype, dense_weight, embed_scale
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig
from minilora.lora.variants.dora import moved_norms, ratio_and_moves
from minilora.lora.variants.embedding import LoRAEmbedding


@register("dora", on="embedding")
class DoRAEmbedding(LoRAEmbedding):
    """An embedding whose update is scaled column by column.

    Attributes:
        lora_magnitude_vector: ``[dimension]`` fp32, trained: the wanted norm of each column.
        base_norm_squared: ``[dimension]`` fp32, of the table's columns; computed once, not saved.
    """

    file_names: ClassVar[dict[str, str]] = LoRAEmbedding.file_names | {"lora_magnitude_vector": "lora_magnitude_vector"}
    reads_base: ClassVar[bool] = True
    base_norm_squared: Tensor

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        squared = dense_weight(self.innermost).float().square().sum(0)
        self.register_buffer("base_norm_squared", squared, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.column_norms().clone())

    @torch.no_grad()
    def column_norms(self) -> Tensor:
        """``c``: the norms of the columns of ``E + s (B A)^T``, fp32 ``[dimension]``."""
        A, B = self.lora_embedding_A.float(), self.lora_embedding_B.float()
        WA = (A.to(compute_dtype(self.innermost)) @ dense_weight(self.innermost)).float()
        return moved_norms(self.base_norm_squared, WA, A, B, self.scaling)

    def _ratio(self) -> tuple[Tensor, Tensor]:
        return ratio_and_moves(self.lora_magnitude_vector, self.column_norms(), self.base_norm_squared)

    def forward(self, x: Tensor) -> Tensor:
        shown = self.base_layer(x)
        plain = self.innermost(x) if isinstance(self.base_layer, Adapter) else shown
        ratio, moves = self._ratio()
        update = self.update(x) * embed_scale(self.innermost)
        return shown + ((ratio - 1) * plain + ratio * moves * update).to(shown.dtype)

    def delta_weight(self) -> Tensor:
        table = dense_weight(self.innermost).float()
        ratio, moves = self._ratio()
        return ratio * (table + moves * super().delta_weight()) - table

    def as_lora(self) -> tuple[Tensor, Tensor]:
        raise StateError(
            "DoRA rescales every column of the table, so its update has full rank and is no plain LoRA; merge it instead"
        )
