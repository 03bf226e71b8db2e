"""LoRA that starts from a part of the weight itself, and subtracts that part so that the layer begins unchanged.

    y = W x + s * (B A - B0 A0) x,      B = B0 and A = A0 at the start

PEFT writes ``W - s B0 A0`` into the base model instead; then disabling the adapter no longer gives the base, and a second adapter meets a
changed one. Here the base is never touched, at the cost of one more thin product. The file holds A and B, as PEFT's does: both
libraries find B0 and A0 again from the base weight. Where they come from data, the file has them too.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from minilora.linear.layers import dense_weight
from minilora.lora.config import LoraConfig
from minilora.lora.factors import beside
from minilora.lora.layer import LoRALinear


class ResidualLoRA(LoRALinear):
    """Base of PiSSA and OLoRA: a subclass says which part of the weight it starts from.

    Attributes:
        start_A, start_B: the factors at the start, fp32, never trained and not saved.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.register_buffer("start_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("start_B", self.lora_B.detach().clone(), persistent=False)

    @abstractmethod
    def part_of(self, weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
        """``(A [r, in], B [out, r])`` for the base weight ``[out, in]`` in fp32."""

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        super().initial_factors(config)  # draws what PEFT draws before
        return (*self.part_of(dense_weight(self.innermost).float(), config), None)

    def update(self, x: Tensor) -> Tensor:
        start = F.linear(F.linear(x, self.start_A.to(x.dtype)), self.start_B.to(x.dtype)) * self.scaling
        return super().update(x) - start

    def delta_weight(self) -> Tensor:
        return super().delta_weight() - self.scaling * (self.start_B.float() @ self.start_A.float())

    def as_lora(self) -> tuple[Tensor, Tensor]:
        A, B = super().as_lora()
        return beside(A, B, self.start_A.float(), -self.scaling * self.start_B.float())


class DataStartLoRA(ResidualLoRA):
    """Base of CorDA and LoRA-GA, whose start is made from data that was left at the base layer. Without it there is only what a file has.

    The start factors are saved: nobody finds them again from the base weight.
    """

    file_names: ClassVar[dict[str, str]] = LoRALinear.file_names | {
        "start_A": "lora_start_A",
        "start_B": "lora_start_B",
    }
    without_data: ClassVar[str]

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.register_buffer("start_A", self.start_A)  # now a part of the state dict
        self.register_buffer("start_B", self.start_B)

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, None]:
        if hasattr(self.innermost, self.data_name):
            return super().initial_factors(config)
        A, B, _ = LoRALinear.initial_factors(self, config)
        self.wants_file = type(self).without_data
        return A, B, None
