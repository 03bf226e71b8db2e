"""Lesson 8. The kernel: tiles, bytes moved, roofline.

A kernel for packed weights decodes a tile, multiplies it and forgets it, so the dense weight never stands in memory. Whether that is fast
depends on which takes longer, to move the bytes or to compute (Williams et al. 2009, "Roofline"). Fill in the functions;
``minilora learn check 8`` looks at them.
"""

from collections.abc import Callable

import torch


def tiled_linear(
    x: torch.Tensor, decode: Callable[[int, int], torch.Tensor], out_features: int, tile: int
) -> torch.Tensor:
    """x W^T, where W [out, in] is decoded a tile of rows at a time, and each row once.

    decode(first, end) returns rows first up to, not with, end of W, at most ``tile`` of them, fp32. x is [tokens, in] fp32. out need not
    be a multiple of tile. Returns [tokens, out].
    """
    raise NotImplementedError


def bytes_moved(tokens: int, in_features: int, out_features: int, bits: float, itemsize: int) -> float:
    """Bytes that x W^T moves at least: W once in ``bits`` bits a weight, x once, and the output once in ``itemsize`` bytes a number."""
    raise NotImplementedError


def least_seconds(flops: float, moved: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The roofline: the least time of work of so many operations and bytes, where moving and computing go on at the same time."""
    raise NotImplementedError


def turning_point(bits: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The tokens of a batch from which on x W^T is bound by arithmetic and no more by reading W, as a float.

    A token costs 2 operations a weight. Only W's bytes count, ``bits`` bits a weight; x and the output are left out.
    """
    raise NotImplementedError
