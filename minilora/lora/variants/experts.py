"""LoRA on the experts of a mixture: each expert has thin factors of its own, and its tokens alone pass through them.

    y_e = W_e x + scaling * B_e A_e x          for the tokens of expert e;   A [E, r, in],  B [E, out, r]

It is LoRA as on a linear layer with one more dimension in front, so the law, sums, merging and spectra are the linear ones, expert by
expert. PEFT forms ``W + delta`` in every forward pass; here no dense update is formed. A file has PEFT's layout (its ``ParamWrapper``):
A as ``[E * r, in]``, B as ``[out, r * E]`` with the expert counting fastest. Of a projection that lies ``[E, in, out]`` and does not say
so (Llama 4), PEFT takes the inputs for the outputs: its A is our B and the other way round. Next file: ``lora/variants/experts_starts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.linear.experts.grouped import grouped_linear, lora_experts
from minilora.linear.experts.known import declared
from minilora.linear.experts.layers import ExpertsLinear, QuantExperts, stack_of
from minilora.linear.experts.routes import Routes
from minilora.linear.experts.whole import Projection
from minilora.linear.layers import calls_only_forward
from minilora.linear.ops import is_transformed
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear, is_known_dropout, uniform

__all__ = ["LoRAExperts", "from_file", "in_file", "nest", "thin"]

_OTHER = {"lora_A": "lora_B", "lora_B": "lora_A"}


@register("lora", on="experts")
class LoRAExperts(LoRALinear):
    """One projection of all experts, with a low-rank update for each.

    Attributes:
        lora_A: ``[E, r, in]`` fp32, trained. lora_B: ``[E, out, r]`` fp32, trained.
        inside: how many other adapted projections of the same module a file has around this one.

    Raises:
        ConfigError: ``lora_bias``, of which there would be one for each expert; PEFT has none here.
    """

    inside = 0

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        if config.lora_bias:
            raise ConfigError(
                f"{path}: lora_bias=True is not for experts; set it to False, or leave them out (exclude_modules)"
            )
        super().__init__(base_layer, config, path)
        if self.crossed:
            names = self.file_names
            self.file_names = {name: names[_OTHER.get(name, name)] for name in names}  # type: ignore[misc]

    @property
    def experts(self) -> int:
        """How many there are."""
        layer = self.innermost
        assert isinstance(layer, (ExpertsLinear, QuantExperts))
        return layer.experts

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        """As on a linear layer, drawn in PEFT's layout: A as ``[E * r, in]`` and B as ``[out, r * E]``."""
        E, r = self.experts, self.r
        A, B = uniform((E * r, self.in_features), self.in_features), uniform((self.out_features, r * E), r * E)
        if config.init_lora_weights == "gaussian":
            A.normal_(std=1 / r)
        elif config.init_lora_weights is True:
            A = uniform((E * r, self.in_features), self.in_features)
        if config.init_lora_weights:
            B.zero_()
        return A.unflatten(0, (E, r)), B.unflatten(1, (r, E)).permute(2, 0, 1), None

    def forward(self, x: Tensor, routes: Routes) -> Tensor:  # type: ignore[override]
        """``[S, in]`` sorted by expert to ``[S, out]``."""
        base, dropout = self.base_layer, self.lora_dropout
        if not self._at_once(base, dropout):
            return base(x, routes) + self.update(dropout(x), routes)
        return lora_experts(x, stack_of(base), routes, *self._low_rank())

    def as_projection(self) -> Projection | None:
        """What ``forward`` multiplies with, where it does nothing else."""
        if type(self).forward is not LoRAExperts.forward or not self._at_once(self.base_layer, self.lora_dropout):
            return None
        return Projection(stack_of(self.base_layer), *self._low_rank())

    def _low_rank(self) -> tuple[Tensor, Tensor, float, float]:
        """A, B, scaling, and the probability of dropout now."""
        dropout = self.lora_dropout
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return self.lora_A, self.lora_B, self.scaling, p

    def _at_once(self, base: nn.Module, dropout: nn.Module) -> bool:
        """Whether nobody has changed what ``forward`` is made of, and the base is a frozen projection."""
        if type(self).update is not LoRAExperts.update or not is_known_dropout(dropout):
            return False
        if torch.compiler.is_compiling() or is_transformed() or not calls_only_forward(base):
            return False
        return type(base) is QuantExperts or (type(base) is ExpertsLinear and not base.weight.requires_grad)

    def update(self, x: Tensor, routes: Routes) -> Tensor:  # type: ignore[override]
        """``scaling * B_e A_e x`` for the rows of every expert, in the dtype that flows."""
        return thin(x, self.lora_A, self.lora_B, routes) * self.scaling

    @property
    def crossed(self) -> bool:
        """Whether a file has B where A is elsewhere."""
        return bool(self.innermost.crossed)

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        if name not in _OTHER:
            return tensor
        return in_file(_OTHER[name], tensor.transpose(1, 2)) if self.crossed else in_file(name, tensor)

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        if name not in _OTHER:
            return tensor
        held = from_file(_OTHER[name] if self.crossed else name, tensor, self.experts)
        return held.transpose(1, 2) if self.crossed and held is not tensor else held

    def file_path(self, path: str) -> str:  # type: ignore[override]
        """The experts module, and inside of how many other adapters of it: PEFT nests them, the first projection innermost."""
        return path.rpartition(".")[0] + ".base_layer" * self.inside


def in_file(name: str, tensor: Tensor) -> Tensor:
    """A factor of all experts, ``A [E, r, in]`` or ``B [E, out, r]``, as a file has it: ``[E * r, in]``, ``[out, r * E]``."""
    if name == "lora_A":
        return tensor.flatten(0, 1)
    return tensor.permute(1, 2, 0).flatten(1) if name == "lora_B" else tensor


def from_file(name: str, tensor: Tensor, experts: int) -> Tensor:
    """The inverse of ``in_file``; a tensor that is not of so many experts comes back as it is."""
    if tensor.dim() != 2 or name not in _OTHER or tensor.shape[0 if name == "lora_A" else 1] % experts:
        return tensor
    if name == "lora_A":
        return tensor.unflatten(0, (experts, -1))
    return tensor.unflatten(1, (-1, experts)).permute(2, 0, 1)


def thin(x: Tensor, A: Tensor, B: Tensor, routes: Routes) -> Tensor:
    """``B_e A_e x`` of sorted rows: ``[S, in]`` to ``[S, out]``, by torch's own products."""
    return grouped_linear(grouped_linear(x, A.to(x.dtype), routes), B.to(x.dtype), routes)


def nest(values: Mapping[str, Any]) -> None:
    """Note of each adapter on experts inside of how many others its file has it: those of one module, in the order of its weights."""
    owners: dict[str, dict[str, LoRAExperts]] = {}
    for path, value in values.items():
        if isinstance(value, LoRAExperts):
            owner, _, name = path.rpartition(".")
            owners.setdefault(owner, {})[name] = value
    for found in owners.values():
        for at, name in enumerate(reversed(declared(found))):
            found[name].inside = at
