"""Blockwise absmax quantization: ``quantize`` a weight to packed codes and scales, ``QuantizedTensor.dequantize`` it again.

    block of 64 weights --(/ largest magnitude)--> values in [-1, 1] --(nearest level)--> 64 codes of 4 bits + 1 scale

Double quantization (QLoRA section 3) stores the scales in 8 bits, less their mean, in blocks of 256: 4.127 instead of 4.5 bits per
weight. Codes, scales and values equal bitsandbytes' CPU results to the bit, its treatment of ties, ragged tails and zero blocks
included (measured on bitsandbytes 0.50.2). Blocks run over the flattened weight, across rows. Next file: ``quant/lookup.py``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.quant.codebooks import Codebook, codebook, constant, dynamic_map
from minilora.quant.config import QuantConfig, quant_config
from minilora.quant.lookup import decode_into, decode_reference, nearest_code, pack, scratch
from minilora.quant.scales import TINY, absmax_scales, guarded, searched_scales

NESTED_BLOCKSIZE = 256  # scales that share a scale of their own
_OUTLIER = 50.0  # times the median scale
_CHUNK = 1 << 18  # weights worked on at a time: a few MB of scratch, whatever the layer


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

    def scales(self) -> Tensor:
        """The fp32 scale of every block, ``[blocks]``, decoded from 8 bits where it is stored so."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        levels = dynamic_map().to(self.absmax.device)[self.absmax.int()]
        return levels * _spread(self.nested_absmax, NESTED_BLOCKSIZE, levels.numel()) + self.nested_offset

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
        chunk = _CHUNK if torch.get_num_threads() == 1 else 8 * _CHUNK
        for start in range(0, flat.numel(), chunk):
            stop = min(start + chunk, flat.numel())
            if dtype == torch.float32:
                decode_range(self, scales, start, flat[start:stop])
            else:
                part = (
                    torch.empty(stop - start, dtype=torch.float32, device=flat.device)
                    if flat.is_cuda
                    else scratch("part", stop - start, torch.float32)
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
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        values, scales = flat[start:stop].float(), absmax[start // size : math.ceil(stop / size)]
        mass = None if weighing is None else weighing[torch.arange(start, stop, device=flat.device) % len(weighing)]
        _choose_scales(values, book, config, mass, scales)
        codes = _codes(values, book, size, scales)
        packed[start * book.bits // 8 : math.ceil(stop * book.bits / 8)] = _packed(codes, book.bits, zero)
    if weight.dim() > 1 and weight.shape[-1] * book.bits % 8 == 0:
        packed = packed.view(*weight.shape[:-1], weight.shape[-1] * book.bits // 8)
    nests = config.double_quant and not _has_outlier(absmax, name)
    stored = _quantize_scales(absmax, name) if nests else {"absmax": absmax}
    return QuantizedTensor(packed, shape=weight.shape, dtype=weight.dtype, book=book, blocksize=size, **stored)


def _check_importance(importance: Tensor | None, weight: Tensor, name: str) -> Tensor:
    if importance is None:
        raise QuantizationError(f"{name}: scale='weighted' wants the importance of each input; see minilora.calibrate")
    if importance.shape != weight.shape[-1:]:
        raise QuantizationError(
            f"{name}: importance is {list(importance.shape)}; wanted [{weight.shape[-1]}], one number an input"
        )
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
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
    # A sum in float64 cannot overflow, so it is finite exactly when every value is: one pass, no mask.
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float64))):
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


@constant
def _scale_codes() -> Tensor:
    """Nearest level of ``dynamic_map()`` for 65,536 even steps over [-1, 1]: bitsandbytes' CPU rule, not quite the nearest level."""
    grid = torch.arange(65536, dtype=torch.float64) * 2 / 65535 - 1
    levels = dynamic_map().double()
    return torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _has_outlier(absmax: Tensor, name: str) -> bool:
    """Whether a scale is so far above those that it would share 8 bits with that they would be lost; says so.

    Trained weights stay under 21 times the median (SmolLM2-135M); at 50 the scales' own error is near one percent, and grows from there.
    """
    padded = torch.nn.functional.pad(absmax.abs(), (0, -absmax.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    usual = torch.where(padded > 0, padded, torch.nan).nanmedian(1).values  # blocks of zeros need no scale
    above = (padded.amax(1) / usual).nan_to_num(nan=0.0)
    if not bool((above > _OUTLIER).any()):
        return False
    warnings.warn(
        f"{name}: a scale is {float(above.max()):.3g} times as large as most around it, so the scales of this tensor stay in fp32; "
        "those of the others are packed",
        stacklevel=3,
    )
    return True


def _quantize_scales(absmax: Tensor, name: str) -> dict[str, Tensor]:
    """Double quantization: scales less their mean, in 8 bits, 256 of them to an fp32 scale (QLoRA section 3)."""
    offset = absmax.mean()
    if not bool(torch.isfinite(offset)):
        raise QuantizationError(f"{name}: the mean of its scales overflows float32; use double_quant=False")
    residual = absmax - offset
    padded = torch.nn.functional.pad(residual, (0, -residual.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    nested = padded.abs().amax(1)
    scaled = residual * _spread(nested.reciprocal(), NESTED_BLOCKSIZE, residual.numel())
    # Equal scales: 0 x infinity; bitsandbytes writes code 0, and any code decodes right.
    scaled = scaled.nan_to_num(nan=-1.0)
    step = ((scaled.clamp(-1, 1) + 1) * 32767.5 + 0.5).long()
    return {
        "absmax": _scale_codes().to(absmax.device)[step],
        "nested_absmax": nested,
        "nested_offset": offset.reshape(1),
    }


def _spread(values: Tensor, size: int, count: int) -> Tensor:
    """Each value repeated ``size`` times, cut to ``count``."""
    return values.repeat_interleave(size)[:count]
