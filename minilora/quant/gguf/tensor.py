"""A weight of a GGUF file as it lies there: ``GGUFTensor``. Next file: ``linear/gguf.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.quant.finite import is_finite
from minilora.quant.gguf.formats import gguf_format
from minilora.quant.weight import Decoder, PackedWeight

__all__ = ["GGUFTensor", "gguf_tensor"]

_PIECE = 1 << 18  # weights decoded at a time on a CPU, so that what is made on the way stays in the cache


@dataclass(frozen=True)
class GGUFTensor(PackedWeight):
    """A weight as blocks of bytes, row after row.

    Args:
        packed: uint8 ``[out, bytes of a row]``, the bytes of the file.
        kind: the GGUF type, such as "Q4_K".
        shape: ``[out, in]``; ``in`` is a whole number of blocks.
        dtype: what ``dequantize()`` returns; llama.cpp decodes to fp32.
    """

    packed: Tensor
    kind: str
    shape: torch.Size
    dtype: torch.dtype = torch.float32

    @property
    def format(self) -> str:
        """The GGUF type."""
        return self.kind

    @property
    def unit(self) -> int:
        """Weights of a block."""
        return gguf_format(self.kind).weights

    def parts(self) -> tuple[Tensor | None, ...]:
        """The bytes."""
        return (self.packed,)

    def with_parts(self, parts: Sequence[Tensor | None]) -> GGUFTensor:
        """The same type over other bytes."""
        (packed,) = parts
        assert packed is not None
        return replace(self, packed=packed)

    def decoder(self) -> Decoder:
        """As ``PackedWeight.decoder``; blocks are decoded from where they lie."""
        form = gguf_format(self.kind)
        blocks = self.packed.reshape(-1, form.nbytes)

        def decode(start: int, out: Tensor) -> None:
            piece = _PIECE if out.device.type == "cpu" else max(1, out.numel())
            for first in range(0, out.numel(), piece):
                part = out[first : first + piece].view(-1, form.weights)
                at = (start + first) // form.weights
                form.decode(blocks[at : at + len(part)], part)

        return decode

    def rows(self, chosen: Tensor | slice) -> GGUFTensor:
        """Some rows, or all in another order: no block is touched."""
        packed = self.packed[chosen]
        return replace(self, packed=packed, shape=torch.Size((len(packed), self.shape[1])))


def gguf_tensor(
    packed: Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, name: str = "weight"
) -> GGUFTensor:
    """A ``GGUFTensor`` of bytes that come from outside.

    Args:
        packed: uint8, any shape; as many bytes as the weight takes. shape: ``(out, in)``. name: what an error calls the tensor.

    Raises:
        QuantizationError: a type that is not known here, a row that is no whole number of blocks, another number of bytes, or a scale that
            is NaN or infinity.
    """
    form, (rows, columns) = gguf_format(kind), shape
    if columns % form.weights or not columns or not rows:
        raise QuantizationError(
            f"{name} is {[rows, columns]}; wanted rows of whole blocks of {form.weights}, as {kind} has them"
        )
    width = columns // form.weights * form.nbytes
    if packed.dtype != torch.uint8 or packed.numel() != rows * width:
        raise QuantizationError(
            f"{name} has {packed.numel()} numbers of {packed.dtype}; wanted {rows * width} bytes for {[rows, columns]} in {kind}"
        )
    held = packed.reshape(rows, width)
    blocks = held.view(-1, form.nbytes)
    if not all(is_finite(blocks[:, at : at + 2].contiguous().view(torch.float16)) for at in form.halves):
        raise QuantizationError(f"{name}: a scale of its {kind} blocks is NaN or infinity; the file is damaged")
    return GGUFTensor(held, kind, torch.Size((rows, columns)), dtype)
