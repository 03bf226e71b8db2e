"""GGUF's formats of 32 weights a block: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

    _0:  weight = d * (q - half)      d fp16, q unsigned of 4 or 5 bits, half 8 or 16; of 8 bits q has its sign
    _1:  weight = d * q + m           d and m fp16

Byte k of the 16 that hold four bits each is for weight k (its low bits) and for weight k + 16 (its high ones). The fifth bits of all 32
weights are one little-endian number of 32 bits. Each format is a ``_reference`` of a few lines, from ggml's description of its blocks
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ``block_q4_0`` to ``block_q8_0`` in ``ggml-common.h``), and a fast twin
that writes the same bits. Next file: ``quant/gguf/blocks256.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.quant.constants import constant
from minilora.quant.gguf.pieces import halves, nibbles, put, room, together

__all__ = [
    "q4_0",
    "q4_0_reference",
    "q4_1",
    "q4_1_reference",
    "q5_0",
    "q5_0_reference",
    "q5_1",
    "q5_1_reference",
    "q8_0",
    "q8_0_reference",
]


def q4_0_reference(blocks: Tensor) -> Tensor:
    """``d`` 2 bytes, ``q`` 16 bytes: ``[n, 18]`` to ``[n, 32]``."""
    return halves(blocks, 0) * (_four_bits(blocks[:, 2:]) - 8)


def q4_1_reference(blocks: Tensor) -> Tensor:
    """``d`` 2, ``m`` 2, ``q`` 16: ``[n, 20]`` to ``[n, 32]``."""
    return halves(blocks, 0) * _four_bits(blocks[:, 4:]) + halves(blocks, 2)


def q5_0_reference(blocks: Tensor) -> Tensor:
    """``d`` 2, fifth bits 4, low bits 16: ``[n, 22]`` to ``[n, 32]``."""
    return halves(blocks, 0) * (_four_bits(blocks[:, 6:]) + 16 * _fifth_bits(blocks[:, 2:6]) - 16)


def q5_1_reference(blocks: Tensor) -> Tensor:
    """``d`` 2, ``m`` 2, fifth bits 4, low bits 16: ``[n, 24]`` to ``[n, 32]``."""
    return halves(blocks, 0) * (_four_bits(blocks[:, 8:]) + 16 * _fifth_bits(blocks[:, 4:8])) + halves(blocks, 2)


def q8_0_reference(blocks: Tensor) -> Tensor:
    """``d`` 2, ``q`` 32 with their sign: ``[n, 34]`` to ``[n, 32]``."""
    return halves(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _four_bits(held: Tensor) -> Tensor:
    return torch.cat([held & 15, held >> 4], 1).int()


def _fifth_bits(held: Tensor) -> Tensor:
    return (held.int()[:, :, None] >> torch.arange(8, device=held.device) & 1).flatten(1)


def q4_0(blocks: Tensor, out: Tensor) -> None:
    """``q4_0_reference`` into fp32 ``out [n, 32]``."""
    put(nibbles(blocks[:, 2:]).view(torch.int8).sub_(8), halves(blocks, 0), out)


def q4_1(blocks: Tensor, out: Tensor) -> None:
    """``q4_1_reference`` into fp32 ``out [n, 32]``."""
    put(nibbles(blocks[:, 4:]), halves(blocks, 0), out, halves(blocks, 2).neg_())


def q5_0(blocks: Tensor, out: Tensor) -> None:
    """``q5_0_reference`` into fp32 ``out [n, 32]``."""
    put(_five_bits(blocks[:, 2:]).view(torch.int8).sub_(16), halves(blocks, 0), out)


def q5_1(blocks: Tensor, out: Tensor) -> None:
    """``q5_1_reference`` into fp32 ``out [n, 32]``."""
    put(_five_bits(blocks[:, 4:]), halves(blocks, 0), out, halves(blocks, 2).neg_())


def q8_0(blocks: Tensor, out: Tensor) -> None:
    """``q8_0_reference`` into fp32 ``out [n, 32]``."""
    put(together("bytes", blocks[:, 2:]).view(torch.int8), halves(blocks, 0), out)


@constant
def _sixteens() -> Tensor:
    """For each byte of fifth bits the eight bytes that they add, 16 or 0, as one int64."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (16 * bits).to(torch.uint8).contiguous().view(torch.int64).flatten()


def _five_bits(held: Tensor) -> Tensor:
    """The integers ``[n, 2, 16]`` of ``[n, 20]`` bytes: fifth bits, then low bits."""
    whole = nibbles(held[:, 4:])
    index = room("index", (len(held), 4), held, torch.int32).copy_(held[:, :4])
    fifth = room("fifth", (4 * len(held),), held, torch.int64)
    torch.index_select(_sixteens().to(held.device), 0, index.view(-1), out=fifth)
    return whole.bitwise_or_(fifth.view(torch.uint8).view(whole.shape))
