"""Other starts and variants on experts: each expert is treated as the linear layer that it is.

A class here is its linear class with a loop over experts where that computes with one matrix. Next file: ``lora/variants/router.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.experts.grouped import one_expert
from minilora.linear.experts.layers import QuantExperts, stack_of
from minilora.linear.experts.routes import Routes
from minilora.linear.layers import dense_weight
from minilora.linear.ops import matmul
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig
from minilora.lora.factors import beside
from minilora.lora.variants.dora import DoRALinear, moved_norms, ratio_and_moves
from minilora.lora.variants.experts import LoRAExperts, thin
from minilora.lora.variants.loftq import LoftQLinear
from minilora.lora.variants.lora_fa import LoRAFALinear
from minilora.lora.variants.mica import MiCALinear, minor_directions
from minilora.lora.variants.olora import OLoRALinear
from minilora.lora.variants.orthogonal import OrthogonalLoRA, orthogonal_factors
from minilora.lora.variants.pissa import PiSSALinear
from minilora.lora.variants.residual import ResidualLoRA


@register("lora_fa", on="experts")
class LoRAFAExperts(LoRAExperts, LoRAFALinear):
    """A of every expert stays as it was drawn."""


class _EachExpert(LoRAExperts, ResidualLoRA):
    """Base of the starts that look at one matrix: each expert's own."""

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        LoRAExperts.initial_factors(self, config)  # draws what PEFT draws before
        each = [self.part_of(matrix, config) for matrix in dense_weight(self.innermost).float()]
        return (*_stacked(each), None)

    def update(self, x: Tensor, routes: Routes) -> Tensor:  # type: ignore[override]
        start = thin(x, self.start_A, self.start_B, routes)
        return (thin(x, self.lora_A, self.lora_B, routes) - start) * self.scaling

    def as_lora(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return beside(A, self.scaling * B, self.start_A.float(), -self.scaling * self.start_B.float(), True)


@register("pissa", on="experts")
class PiSSAExperts(_EachExpert, PiSSALinear):
    """Each expert starts from the principal directions of its own weight."""


@register("olora", on="experts")
class OLoRAExperts(_EachExpert, OLoRALinear):
    """Each expert starts from the QR decomposition of its own weight."""


@register("mica", on="experts")
class MiCAExperts(LoRAExperts, MiCALinear):
    """B of each expert is what its weight does least, and stays."""

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        A, _, _ = LoRAExperts.initial_factors(self, config)
        directions = [minor_directions(matrix, self.r) for matrix in dense_weight(self.innermost)]
        return torch.zeros_like(A), torch.stack(directions), None


@register("orthogonal", on="experts")
class OrthogonalExperts(LoRAExperts, OrthogonalLoRA):
    """Each expert starts from orthogonal halves of its own."""

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        LoRAExperts.initial_factors(self, config)
        each = [orthogonal_factors(self.r, self.in_features, self.out_features) for _ in range(self.experts)]
        return (*_stacked(each), None)


@register("loftq", on="experts")
class LoftQExperts(LoRAExperts, LoftQLinear):
    """Packs the experts itself; each expert's factors make up for its own error."""

    def around(self, packed: Any, layer: nn.Module) -> nn.Module:
        return QuantExperts.in_place_of(layer, packed)  # type: ignore[arg-type]

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        return LoRAExperts.initial_factors(self, replace(config, init_lora_weights=True))


@register("dora", on="experts")
class DoRAExperts(LoRAExperts, DoRALinear):
    """DoRA with a magnitude for every row of every expert.

    Attributes:
        lora_magnitude_vector: ``[E, out]`` fp32, trained. base_norm_squared: ``[E, out]``.
    """

    @torch.no_grad()
    def row_norms(self, only: Iterable[int] | None = None) -> Tensor:
        """The norms of the rows of ``W_e + s B_e A_e``, ``[E, out]``; ones for experts that are not among ``only``."""
        (A, B), norms = self.factors(), torch.ones_like(self.base_norm_squared)
        weight = stack_of(self.innermost)
        for e in range(self.experts) if only is None else only:
            WA = matmul(A[e].to(self._base_dtype()), one_expert(weight, e), True, out_dtype=torch.float32)
            norms[e] = moved_norms(self.base_norm_squared[e], WA, A[e], B[e], self.scaling)
        return norms

    def forward(self, x: Tensor, routes: Routes) -> Tensor:  # type: ignore[override]
        shown = self.base_layer(x, routes)
        plain = self.innermost(x, routes) if isinstance(self.base_layer, Adapter) else shown
        norms = self.row_norms([expert for expert, _, _ in routes.spans])
        ratio, moves = (routes.of_experts(each).to(plain.dtype) for each in self._ratio_of(norms))
        return shown + (ratio - 1) * plain + ratio * moves * self.update(self.lora_dropout(x), routes)

    def _ratio(self) -> tuple[Tensor, Tensor]:
        return self._ratio_of(self.row_norms())

    def _ratio_of(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        return ratio_and_moves(self.lora_magnitude_vector, norms, self.base_norm_squared)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    A, B = zip(*pairs, strict=True)
    return torch.stack(A), torch.stack(B)
