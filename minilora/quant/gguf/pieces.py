"""The steps that decoding shares: a half number out of the bytes of blocks, four bits out of a byte, integers times scales.

A block's parts are a few bytes each, and a loop over 16 bytes costs as much as one over 1000. So a part of all blocks is first copied
together into a buffer that is reused, and nearly all that follows is done on one long row. Next file: ``quant/gguf/blocks32.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minilora.quant.lookup import scratch

__all__ = ["halves", "nibbles", "put", "room", "together"]


def room(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A buffer of this shape beside ``like``; on a CPU the one that the last call of this name got."""
    if like.device.type == "cpu":
        return scratch(f"gguf {name}", math.prod(shape), dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=like.device)


def halves(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte ``at`` of each block ``[n, bytes]``: fp32 ``[n, 1]``."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def together(name: str, part: Tensor) -> Tensor:
    """Bytes of many blocks, without what lies between them."""
    return room(name, tuple(part.shape), part).copy_(part)


def nibbles(part: Tensor) -> Tensor:
    """``[..., w]`` bytes to ``[..., 2, w]``: the low four bits of each, then the high ones. ``w`` is a multiple of 16."""
    own = together("bytes", part)
    both = room("integers", (*own.shape[:-1], 2, own.shape[-1]), own)
    wide = both.view(torch.complex128)  # 16 bytes moved as one; no number is meant
    half = room("half", tuple(own.shape), own)
    for place in range(2):
        if place:
            torch.bitwise_right_shift(own, 4, out=half)
        else:
            torch.bitwise_and(own, 15, out=half)
        wide[..., place, :].copy_(half.view(torch.complex128))
    return both


def put(whole: Tensor, scale: Tensor, out: Tensor, minimum: Tensor | None = None) -> None:
    """``out = whole * scale``, and ``- minimum`` where there is one, in fp32 and in this order.

    Args:
        whole: integers, the groups in turn. scale, minimum: fp32 ``[groups, 1]``. out: fp32, contiguous, as ``whole``.
    """
    groups = out.view(len(scale), -1)
    groups.copy_(whole.view(groups.shape)).mul_(scale)
    if minimum is not None:
        groups.sub_(minimum)
