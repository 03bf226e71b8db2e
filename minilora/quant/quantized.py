"""What a weight in few bits is: ``QuantizedTensor``, packed codes and scales, and how ``dequantize`` gives the dense weight back.

    4-bit code --(codebook)--> level in [-1, 1] --(x the scale of its block of 64)--> weight, rounded once to its dtype

Next file: ``quant/nested.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.quant.codebooks import Codebook, codebook
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import decode_into, decode_reference, scratch
from minilora.quant.nested import NESTED_BLOCKSIZE, unnested

CHUNK = 1 << 18  # weights worked on at a time: a few MB of scratch, whatever the layer


@dataclass(frozen=True)
class QuantizedTensor:
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
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Exact storage per weight in bits, scales included (4.127 for NF4, blocksize 64, double quantization)."""
        return 8 * self.nbytes / max(1, self.shape.numel())

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The fp32 scales of blocks ``first`` to ``last`` (all of them), decoded from 8 bits where they are stored so."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax if (first, last) == (0, None) else self.absmax[first:last]
        return unnested(self.absmax[first:last], self.nested_absmax, self.nested_offset, first)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dense weight, ``shape``, in ``dtype`` (default: its dtype before): fp32 level x fp32 scale, rounded once.

        ``out``: a contiguous tensor of that shape to write into, which is several times faster for a large weight than fresh memory;
        its dtype counts then. Raises ``QuantizationError`` if it does not fit.
        """
        if out is not None and (out.shape != self.shape or not out.is_contiguous() or out.device != self.packed.device):
            raise QuantizationError(
                f"out is {tuple(out.shape)} on {out.device}; wanted a contiguous {tuple(self.shape)} on {self.packed.device}"
            )
        dtype = out.dtype if out is not None else dtype or self.dtype
        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device) if out is None else out
        flat, scales = out.view(-1), self.scales()
        # Every chunk starts and ends a few parallel loops, which costs more than a cold cache where cores are shared.
        chunk = CHUNK if torch.get_num_threads() == 1 else 8 * CHUNK
        for start in range(0, flat.numel(), chunk):
            stop = min(start + chunk, flat.numel())
            if dtype == torch.float32:
                decode_range(self, scales, start, flat[start:stop])
            else:
                part = (
                    scratch("part", stop - start, torch.float32)
                    if flat.device.type == "cpu"
                    else torch.empty(stop - start, dtype=torch.float32, device=flat.device)
                )
                decode_range(self, scales, start, part)
                flat[start:stop] = part
        return out


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
