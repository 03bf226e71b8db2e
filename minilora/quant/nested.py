"""Double quantization (QLoRA section 3): the scales themselves in 8 bits, less their mean, in blocks of 256.

A weight in NF4 with a scale for each 64 then takes 4.127 bits instead of 4.5. Codes equal bitsandbytes' to the bit. A tensor with a
scale far above the others keeps its scales in fp32: in 8 bits it would coarsen all that share a block with it.
Next file: ``quant/lookup.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.errors import QuantizationError, warn
from minilora.quant.codebooks import dynamic_map
from minilora.quant.constants import constant

NESTED_BLOCKSIZE = 256  # scales that share a scale of their own
_OUTLIER = 50.0  # times the median scale


@constant
def _scale_codes() -> Tensor:
    """Nearest level of ``dynamic_map()`` for 65,536 even steps over [-1, 1]: bitsandbytes' CPU rule, not quite the nearest level."""
    grid = torch.arange(65536, dtype=torch.float64) * 2 / 65535 - 1
    levels = dynamic_map().double()
    return torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def has_outlier(absmax: Tensor, name: str) -> bool:
    """Whether a scale is so far above those that it would share 8 bits with that they would be lost; says so.

    Trained weights stay under 21 times the median (SmolLM2-135M); at 50 the scales' own error is near one percent, and grows from there.
    """
    padded = torch.nn.functional.pad(absmax.abs(), (0, -absmax.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    usual = torch.where(padded > 0, padded, torch.nan).nanmedian(1).values  # blocks of zeros need no scale
    above = (padded.amax(1) / usual).nan_to_num(nan=0.0)
    if not bool((above > _OUTLIER).any()):
        return False
    warn(
        f"{name}: a scale is {float(above.max()):.3g} times as large as most around it, so the scales of this tensor stay in fp32; "
        "those of the others are packed"
    )
    return True


def nested_scales(absmax: Tensor, name: str) -> dict[str, Tensor]:
    """Double quantization: scales less their mean, in 8 bits, 256 of them to an fp32 scale (QLoRA section 3)."""
    offset = absmax.cpu().mean().to(absmax.device)  # one order of summing, so that every device packs to the same bytes
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


def unnested(codes: Tensor, nested: Tensor, offset: Tensor, first: int = 0) -> Tensor:
    """The fp32 scales, ``[n]``, that ``nested_scales`` made ``codes``, ``nested`` and ``offset`` of; ``codes`` begin at block ``first``."""
    levels = dynamic_map().to(codes.device)[codes.int()]
    own, within = nested[first // NESTED_BLOCKSIZE :], first % NESTED_BLOCKSIZE
    if not within and levels.numel() % NESTED_BLOCKSIZE == 0:  # the same without spreading them out
        whole = levels.view(-1, NESTED_BLOCKSIZE)
        return whole.mul_(own[: len(whole)].unsqueeze(1)).add_(offset).view(-1)
    return levels * _spread(own, NESTED_BLOCKSIZE, within + levels.numel())[within:] + offset


def _spread(values: Tensor, size: int, count: int) -> Tensor:
    """Each value repeated ``size`` times, cut to ``count``."""
    return values.repeat_interleave(size)[:count]
