"""What a weight in few bits is: ``QuantizedTensor``, packed codes and scales, and how ``dequantize`` gives the dense weight back.

    4-bit code --(codebook)--> level in [-1, 1] --(x the scale of its block of 64)--> weight, rounded once to its dtype

Next file: ``quant/nested.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilora.quant.codebooks import Codebook, codebook
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import decode_into, decode_reference
from minilora.quant.nested import NESTED_BLOCKSIZE, unnested
from minilora.quant.weight import Decoder, PackedWeight


@dataclass(frozen=True)
class QuantizedTensor(PackedWeight):
    """A weight as packed codes and scales.

    Args:
        packed: uint8 codes, first weight in the highest bits; ``[out, in * bits / 8]`` where a row divides evenly, else flat.
        absmax: fp32 ``[blocks]``; with double quantization uint8 ``[blocks]``, indices into ``dynamic_map()``.
        shape: of the weight.
        dtype: of the weight before quantization; ``dequantize()`` returns it.
        book: the codebook of the codes.
        blocksize: weights per scale.
        nested_absmax: fp32 ``[ceil(blocks / 256)]`` with double quantization, else None.
        nested_offset: fp32 ``[1]``, the mean that was taken from the scales, else None.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    book: Codebook
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def format(self) -> str:
        """The codebook's name."""
        return self.book.name

    @property
    def unit(self) -> int:
        """Weights that share a scale."""
        return self.blocksize

    def parts(self) -> tuple[Tensor | None, ...]:
        """Codes and scales, and those of the scales."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    def with_parts(self, parts: Sequence[Tensor | None]) -> QuantizedTensor:
        """The same format over other codes and scales."""
        packed, absmax, nested, offset = parts
        assert packed is not None and absmax is not None
        return replace(self, packed=packed, absmax=absmax, nested_absmax=nested, nested_offset=offset)

    @property
    def levels(self) -> tuple[float, ...]:
        """Those of the codebook."""
        return self.book.levels

    def decoder(self) -> Decoder:
        """As ``PackedWeight.decoder``: fp32 level x fp32 scale."""
        return functools.partial(decode_range, self, self.scales())

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The fp32 scales of blocks ``first`` to ``last`` (all of them), decoded from 8 bits where they are stored so."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax if (first, last) == (0, None) else self.absmax[first:last]
        return unnested(self.absmax[first:last], self.nested_absmax, self.nested_offset, first)


def empty_quantized(
    shape: tuple[int, int], config: QuantConfig, dtype: torch.dtype, device: torch.device | str = "meta"
) -> QuantizedTensor:
    """Storage of the shape that ``quantize`` would return, with nothing in it: a place to load into."""
    book, count = codebook(config.format), math.prod(shape)
    blocks, size = math.ceil(count / config.blocksize), math.ceil(count * book.bits / 8)
    whole_rows = shape[-1] * book.bits % 8 == 0
    packed = torch.empty((shape[0], size // shape[0]) if whole_rows else (size,), dtype=torch.uint8, device=device)
    scale_type = torch.uint8 if config.double_quant else torch.float32
    absmax = torch.empty(blocks, dtype=scale_type, device=device)
    nested = offset = None
    if config.double_quant:
        nested = torch.empty(math.ceil(blocks / NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
        offset = torch.empty(1, dtype=torch.float32, device=device)
    return QuantizedTensor(packed, absmax, torch.Size(shape), dtype, book, config.blocksize, nested, offset)


def decode_range(weight: QuantizedTensor, scales: Tensor, start: int, out: Tensor) -> None:
    """Weights ``start .. start + n`` of the flattened tensor into fp32 ``out [n]``; ``start`` is a multiple of the blocksize."""
    size = weight.blocksize
    bits = weight.book.bits
    packed = weight.packed.view(-1)[start * bits // 8 : math.ceil((start + out.numel()) * bits / 8)]
    if out.device.type == "cpu":
        decode_into(packed, weight.book, out)
    else:
        out.copy_(decode_reference(packed, weight.book, out.numel()))
    whole = out.numel() // size
    first = start // size
    out[: whole * size].view(-1, size).mul_(scales[first : first + whole].unsqueeze(1))
    if out.numel() % size:
        out[whole * size :].mul_(scales[first + whole])
