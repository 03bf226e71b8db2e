"""How far the weights of a GGUF block may lie from those that were packed: what rounding to the nearest allows.

Each function takes blocks uint8 ``[n, nbytes]`` and gives fp32 ``[n, groups]``: half the distance of two neighbouring values of the
group and, where the scale ``s`` and the minimum ``m`` of a group are whole numbers themselves, half a unit of each.
Next file: ``quant/gguf/tensor.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.quant.gguf.blocks256 import six_bits, six_bits_of_sixteen
from minilora.quant.gguf.pieces import halves

__all__ = ["one_scale", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def one_scale(blocks: Tensor) -> Tensor:
    """Of the formats of 32 weights: ``d / 2``."""
    return halves(blocks, 0).abs() / 2


def q2_k(blocks: Tensor) -> Tensor:
    """``q`` is 3 at the most."""
    return _grouped(halves(blocks, 80), blocks[:, :16] & 15, 3, halves(blocks, 82))


def q3_k(blocks: Tensor) -> Tensor:
    """``q - 4`` is 4 at the most, without its sign."""
    return _grouped(halves(blocks, 108), six_bits_of_sixteen(blocks[:, 96:108]).int() - 32, 4)


def q4_k(blocks: Tensor) -> Tensor:
    """``q`` is 15 at the most."""
    return _grouped(halves(blocks, 0), six_bits(blocks[:, 4:16])[0], 15, halves(blocks, 2))


def q5_k(blocks: Tensor) -> Tensor:
    """``q`` is 31 at the most."""
    return _grouped(halves(blocks, 0), six_bits(blocks[:, 4:16])[0], 31, halves(blocks, 2))


def q6_k(blocks: Tensor) -> Tensor:
    """``q - 32`` is 32 at the most, without its sign."""
    return _grouped(halves(blocks, 208), blocks[:, 192:208].view(torch.int8), 32)


def _grouped(unit: Tensor, scale: Tensor, largest: int, offset: Tensor | None = None) -> Tensor:
    """Half a step ``unit * scale``, half a unit that the largest ``q`` multiplies, half a unit of the minimum."""
    room = unit.abs() * (scale.float().abs() + largest)
    return (room if offset is None else room + offset.abs()) / 2
