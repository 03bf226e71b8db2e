"""The steps that decoding shares: a half number out of the bytes of blocks, four bits out of a byte, integers times scales.

A block's parts lie beside each other in few bytes, and a loop over 16 bytes costs as much as over 1000. So a part of all blocks is copied
together once, into a buffer that is reused, and everything until the last step is done on one long row. Next file: ``gguf/blocks32.py``.
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


def nibbles(part: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high four bits of each byte."""
    own = together("bytes", part)
    low, high = room("low", tuple(own.shape), own), room("high", tuple(own.shape), own)
    return torch.bitwise_and(own, 15, out=low), torch.bitwise_right_shift(own, 4, out=high)


def put(whole: Tensor, scale: Tensor, out: Tensor, minimum: Tensor | None = None) -> None:
    """``out = whole * scale``, and ``- minimum`` where there is one, in fp32 and in this order.

    Args:
        whole: integers, contiguous, in the shape of ``out`` or one that can be seen so. scale, minimum: fp32, spread over ``out``'s shape.
        out: fp32; need not be contiguous.
    """
    values = room("values", tuple(out.shape), out, torch.float32).copy_(whole.view(out.shape))
    if minimum is None:
        torch.mul(values, scale, out=out)
    else:
        torch.sub(values.mul_(scale), minimum, out=out)
