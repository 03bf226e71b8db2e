"""Packed weights of many experts, ``[E, out, in]``: one quantized tensor whose blocks never cross from one expert into the next.

Where an expert is no whole number of blocks it is filled up with zeros, so the scales and codes of expert ``e`` lie at known places and
can be decoded apart. Without that filling, the bytes are those that bitsandbytes' ``replace_parameter_4bit`` makes of such a parameter.
Next file: ``quant/bnb.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.quant.blockwise import check_quantizable, quantize
from minilora.quant.codebooks import codebook
from minilora.quant.config import QuantConfig, quant_config
from minilora.quant.quantized import QuantizedTensor, empty_quantized

__all__ = ["QuantizedStack", "empty_stack", "quantize_stack"]


@dataclass(frozen=True)
class QuantizedStack:
    """A stack of quantized matrices.

    Args:
        stored: of shape ``[E, out, in]``, or ``[E, n]`` where a matrix is filled up to ``n`` numbers.
        shape: ``[E, out, in]``.
    """

    stored: QuantizedTensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight before it was quantized."""
        return self.stored.dtype

    @property
    def is_whole(self) -> bool:
        """Whether every matrix is a whole number of blocks, so that nothing was filled up."""
        return self.stored.shape == self.shape

    @property
    def each(self) -> int:
        """Numbers that are stored of a matrix."""
        return math.prod(self.stored.shape[1:])

    def one(self, at: int) -> QuantizedTensor:
        """Matrix ``at``, ``[out, in]``, over the same codes; its scales in fp32. No other matrix is read."""
        own, (_, rows, columns) = self.stored, self.shape
        blocks, bits = self.each // own.blocksize, own.book.bits
        size, used = self.each * bits // 8, -(-rows * columns * bits // 8)
        codes = own.packed.reshape(-1)[at * size : at * size + used]
        codes = codes.view(rows, -1) if columns * bits % 8 == 0 else codes
        scales = own.scales(at * blocks, (at + 1) * blocks)[: -(-rows * columns // own.blocksize)]
        return QuantizedTensor(codes, scales, self.shape[1:], own.dtype, own.book, own.blocksize)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, ``[E, out, in]``."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.stored.packed.device)
        for at in range(len(out)):
            out[at] = self.one(at).dequantize(out.dtype)
        return out


def quantize_stack(weight: Tensor, config: QuantConfig | None = None, name: str = "weight") -> QuantizedStack:
    """Quantize ``[E, out, in]`` matrix by matrix.

    Raises:
        QuantizationError: as ``quantize``, or ``scale="weighted"``, for which nobody has measured the inputs of single experts.
    """
    config = quant_config(config)
    if config.scale == "weighted":
        raise QuantizationError(
            f"{name}: scale='weighted' wants the importance of each input, which is not measured for experts; use 'absmax' or 'mse'"
        )
    if weight.dim() != 3:
        raise QuantizationError(f"{name} is {list(weight.shape)}; wanted [experts, out, in]")
    check_quantizable(weight, name)
    flat, wanted = weight.detach().flatten(1), _filled(weight.shape, config)
    if flat.shape[1] == wanted:
        return QuantizedStack(quantize(weight, config, name), weight.shape)
    return QuantizedStack(
        quantize(torch.nn.functional.pad(flat, (0, wanted - flat.shape[1])), config, name), weight.shape
    )


def empty_stack(
    shape: tuple[int, int, int], config: QuantConfig, dtype: torch.dtype, device: torch.device | str = "meta"
) -> QuantizedStack:
    """Storage of the shapes that ``quantize_stack`` would return, with nothing in it."""
    wanted, whole = _filled(shape, config), torch.Size(shape)
    if wanted == shape[1] * shape[2]:
        flat = empty_quantized((shape[0] * shape[1], shape[2]), config, dtype, device)
        packed = flat.packed.view(*shape[:2], -1) if flat.packed.dim() == 2 else flat.packed
        return QuantizedStack(replace(flat, packed=packed, shape=whole), whole)
    return QuantizedStack(empty_quantized((shape[0], wanted), config, dtype, device), whole)


def _filled(shape: torch.Size | tuple[int, ...], config: QuantConfig) -> int:
    """Numbers of a matrix, filled up to whole blocks."""
    blocks = -(-math.prod(shape[1:]) // config.blocksize)
    assert config.blocksize * codebook(config.format).bits % 8 == 0  # blocks of 32 and more end with a byte
    return blocks * config.blocksize
