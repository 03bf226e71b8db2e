"""Blockwise absmax quantization: ``quantize`` a weight to packed codes and scales, a ``QuantizedTensor``.

    block of 64 weights --(/ largest magnitude)--> values in [-1, 1] --(nearest level)--> 64 codes of 4 bits + 1 scale

Codes, scales and values equal bitsandbytes' CPU results to the bit, its treatment of ties, ragged tails and zero blocks included
(measured on bitsandbytes 0.50.2). Blocks run over the flattened weight, across rows. Next file: ``quant/quantized.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.quant.codebooks import Codebook, codebook
from minilora.quant.config import QuantConfig, quant_config
from minilora.quant.finite import is_finite
from minilora.quant.lookup import nearest_code, nearest_code_reference, pack
from minilora.quant.nested import has_outlier, nested_scales
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.scales import TINY, absmax_scales, guarded, searched_scales
from minilora.quant.weight import CHUNK


def quantize_reference(weight: Tensor, book: Codebook, blocksize: int) -> tuple[Tensor, Tensor]:
    """The idea, which defines ``quantize`` where a weight is whole blocks and scales are absmax.

    Args:
        weight: any shape; a multiple of ``blocksize`` numbers.

    Returns:
        ``(codes [n] uint8, absmax [n / blocksize] fp32)``.
    """
    blocks = weight.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = blocks * guarded(absmax).reciprocal()[:, None]
    return nearest_code_reference(scaled, book).flatten(), absmax


def quantize(
    weight: Tensor, config: QuantConfig | None = None, name: str = "weight", importance: Tensor | None = None
) -> QuantizedTensor:
    """Quantize any floating tensor blockwise.

    Args:
        weight: any shape, fp32, fp16 or bf16 (fp64 is refused: nothing that reads the result could give it back).
        config: format, blocksize, double quantization, scale rule; default NF4, 64, single, absmax.
        name: what an error calls the tensor.
        importance: E[x^2] of each input channel, ``[in]`` non-negative, for ``scale="weighted"``.

    Raises:
        QuantizationError: the tensor is empty, not floating, or holds NaN or infinity (one would poison its whole block); or the
            importance is missing, mis-shaped or not finite.

    Warns:
        UserWarning: double quantization is left out for this tensor, because one scale would coarsen those around it.
    """
    config = quant_config(config)
    book, size = codebook(config.format), config.blocksize
    check_quantizable(weight, name)
    weighing = _check_importance(importance, weight, name) if config.scale == "weighted" else None
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    absmax = torch.empty(math.ceil(count / size), dtype=torch.float32, device=flat.device)
    packed = torch.empty(math.ceil(count * book.bits / 8), dtype=torch.uint8, device=flat.device)
    zero = int(nearest_code(torch.zeros(1, dtype=torch.float32, device=flat.device), book))
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        values, scales = flat[start:stop].float(), absmax[start // size : math.ceil(stop / size)]
        mass = None if weighing is None else weighing[torch.arange(start, stop, device=flat.device) % len(weighing)]
        _choose_scales(values, book, config, mass, scales)
        codes = _codes(values, book, size, scales)
        packed[start * book.bits // 8 : math.ceil(stop * book.bits / 8)] = _packed(codes, book.bits, zero)
    if weight.dim() > 1 and weight.shape[-1] * book.bits % 8 == 0:
        packed = packed.view(*weight.shape[:-1], weight.shape[-1] * book.bits // 8)
    nests = config.double_quant and not has_outlier(absmax, name)
    stored = nested_scales(absmax, name) if nests else {"absmax": absmax}
    return QuantizedTensor(packed, shape=weight.shape, dtype=weight.dtype, book=book, blocksize=size, **stored)


def _check_importance(importance: Tensor | None, weight: Tensor, name: str) -> Tensor:
    if importance is None:
        raise QuantizationError(f"{name}: scale='weighted' wants the importance of each input; see minilora.calibrate")
    if importance.shape != weight.shape[-1:]:
        raise QuantizationError(
            f"{name}: importance is {list(importance.shape)}; wanted [{weight.shape[-1]}], one number an input"
        )
    if not is_finite(importance) or bool((importance < 0).any()):
        found = f"{list(importance.shape)}, from {float(importance.min()):g} to {float(importance.max()):g}"
        raise QuantizationError(f"{name}: importance is {found}; wanted [{weight.shape[-1]}], finite and not negative")
    mean = importance.float().mean()
    # Channels that never spoke still count a little, or their weights would be free to be anything.
    return (
        (importance.float() / mean.clamp(min=TINY)).clamp(min=1e-4).to(weight.device)
        if mean > 0
        else torch.ones_like(importance)
    )


def check_quantizable(weight: Tensor, name: str) -> None:
    """Raise ``QuantizationError`` as ``quantize`` would, without quantizing."""
    if not isinstance(weight, Tensor):
        raise QuantizationError(f"{name} is a {type(weight).__name__}; wanted a tensor")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantizationError(f"{name} is {weight.dtype}; wanted float32, float16 or bfloat16; cast it first")
    if weight.numel() == 0:
        raise QuantizationError(f"{name} is empty ({tuple(weight.shape)}); leave it unquantized")
    if not is_finite(weight):
        raise QuantizationError(
            f"{name} holds NaN or infinity; find what wrote it (a diverged run, an fp16 overflow) first"
        )


def _choose_scales(values: Tensor, book: Codebook, config: QuantConfig, mass: Tensor | None, out: Tensor) -> None:
    """The scale of each block of ``values``, the ragged rest of a tensor as a block filled up with zeros."""
    size = config.blocksize
    whole = values.numel() // size * size
    parts = [
        (values[:whole].view(-1, size), None if mass is None else mass[:whole].view(-1, size), out[: whole // size])
    ]
    if whole < values.numel():
        missing = size - (values.numel() - whole)
        rest = torch.nn.functional.pad(values[whole:], (0, missing)).view(1, size)
        parts.append(
            (
                rest,
                None if mass is None else torch.nn.functional.pad(mass[whole:], (0, missing)).view(1, size),
                out[-1:],
            )
        )
    for blocks, heavy, place in parts:
        if config.scale == "absmax" and not (config.signed_scale or book.signed):
            torch.amax(blocks.abs(), 1, out=place)
        elif config.scale == "absmax":
            place.copy_(absmax_scales(blocks, replace(book, signed=True)))
        else:
            place.copy_(searched_scales(blocks, book, heavy, config.signed_scale))
    if whole < values.numel() and out[-1].abs() < TINY:
        out[-1] = TINY  # as bitsandbytes stores the scale of a ragged block of zeros


def _codes(values: Tensor, book: Codebook, size: int, scales: Tensor) -> Tensor:
    """The code of each value, uint8, after dividing by its block's scale."""
    whole = values.numel() // size * size
    scaled = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
    if whole:
        inverse = guarded(scales[: whole // size]).reciprocal_().unsqueeze(1)
        torch.mul(values[:whole].view(-1, size), inverse, out=scaled[:whole].view(-1, size))
    if whole < values.numel():  # bitsandbytes divides in the tail where it multiplies by the reciprocal elsewhere
        scaled[whole:] = values[whole:] / guarded(scales[-1])
    return nearest_code(scaled.clamp_(-1, 1), book)


def _packed(codes: Tensor, bits: int, zero: int) -> Tensor:
    """``pack``, and for four bits the same in one addition; an odd last half is filled with the code of zero, as bitsandbytes does."""
    if bits != 4:
        return pack(codes, bits)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=zero)
    return codes[::2] * 16 + codes[1::2]
