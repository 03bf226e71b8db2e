"""A frozen linear layer over the blocks of a GGUF file: ``GGUFLinear``. Next file: ``linear/layers.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minilora.linear.frozen import PackedLinear, refuse_other_codes
from minilora.quant.gguf.tensor import GGUFTensor

__all__ = ["GGUFLinear"]


class GGUFLinear(PackedLinear):
    """A frozen linear layer that multiplies with what llama.cpp would multiply with, at the file's own size.

    Attributes: as ``PackedLinear``, and
        codes: uint8 ``[out, bytes of a row]``, the bytes of the file.
        kind: the GGUF type of its blocks, such as "Q4_K".
    """

    def __init__(
        self, weight: GGUFTensor, bias: nn.Parameter | None = None, conv1d: type[nn.Module] | None = None
    ) -> None:
        super().__init__(weight, bias, conv1d)
        self.kind = weight.kind

    @property
    def format(self) -> str:
        """The GGUF type."""
        return self.kind

    def quantized(self) -> GGUFTensor:
        """The weight as a ``GGUFTensor`` over the same memory."""
        codes = refuse_other_codes(self._parameters["weight"])
        return GGUFTensor(codes, self.kind, torch.Size((self.out_features, self.in_features)), self.dtype)

    def meaning(self) -> dict[str, Any]:
        """The GGUF type, and the shape."""
        return {"format": self.kind, "shape": [self.out_features, self.in_features]}
