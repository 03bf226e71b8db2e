"""GGUF's formats of 256 weights a block, llama.cpp's k-quants: Q2_K to Q6_K.

    Q2_K:        weight = (d * s) * q - (dmin * m)      16 groups of 16, each with s and m of 4 bits; q of 2 bits
    Q3_K:        weight = (d * (s - 32)) * (q - 4)      16 groups of 16, each with s of 6 bits; q of 3 bits
    Q4_K, Q5_K:  weight = (d * s) * q - (dmin * m)      8 groups of 32, each with s and m of 6 bits; q of 4 or 5 bits
    Q6_K:        weight = (d * s) * (q - 32)            16 groups of 16, each with s of 8 bits and a sign; q of 6 bits

The scales of the groups are integers themselves, with one fp16 number for all of them. Each format is a ``_reference`` of a few lines,
from ggml's description (``block_q2_K`` to ``block_q6_K`` in ``ggml-common.h``), and a fast twin that writes the same bits.
Next file: ``quant/gguf/slack.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.quant.gguf.pieces import halves, nibbles, put, room, together

__all__ = [
    "q2_k",
    "q2_k_reference",
    "q3_k",
    "q3_k_reference",
    "q4_k",
    "q4_k_reference",
    "q5_k",
    "q5_k_reference",
    "q6_k",
    "q6_k_reference",
    "six_bits",
    "six_bits_of_sixteen",
]


def q2_k_reference(blocks: Tensor) -> Tensor:
    """``s`` (low bits) and ``m`` (high ones) 16 bytes, ``q`` 64, ``d`` 2, ``dmin`` 2: ``[n, 84]`` to ``[n, 256]``."""
    factor, offset = halves(blocks, 80) * (blocks[:, :16] & 15), halves(blocks, 82) * (blocks[:, :16] >> 4)
    return (factor[:, :, None] * _two_bits(blocks[:, 16:80]) - offset[:, :, None]).flatten(1)


def _two_bits(held: Tensor) -> Tensor:
    """``[n, 64]`` to ``[n, 16, 16]``: 32 bytes hold four runs of 32 weights, run ``g`` in bits ``2 g`` and ``2 g + 1``."""
    held = held.reshape(-1, 2, 1, 32)
    return torch.cat([held >> 2 * run & 3 for run in range(4)], 2).view(-1, 16, 16)


def q3_k_reference(blocks: Tensor) -> Tensor:
    """Third bits 32 bytes, low bits 64, ``s`` 12, ``d`` 2: ``[n, 110]`` to ``[n, 256]``. The third bits lie as Q5_K's fifth ones do."""
    third = torch.stack([blocks[:, :32] >> run & 1 for run in range(8)], 1).view(-1, 16, 16)
    whole = (_two_bits(blocks[:, 32:96]) | third << 2).int() - 4
    factor = halves(blocks, 108) * (six_bits_of_sixteen(blocks[:, 96:108]).int() - 32)
    return (factor[:, :, None] * whole).flatten(1)


def six_bits_of_sixteen(held: Tensor) -> Tensor:
    """``s`` of the sixteen groups: ``[n, 12]`` to ``[n, 16]``.

    The low four bits are those of bytes 0 to 7, the low halves first; the upper two are bits ``2 k`` and ``2 k + 1`` of bytes 8 to 11 for
    groups ``4 k`` to ``4 k + 3``.
    """
    low, upper = held[:, :8], held[:, 8:]
    return torch.cat([low & 15, low >> 4], 1) | torch.cat([upper >> 2 * four & 3 for four in range(4)], 1) << 4


def q4_k_reference(blocks: Tensor) -> Tensor:
    """``d`` 2 bytes, ``dmin`` 2, ``s`` and ``m`` 12, ``q`` 128: ``[n, 144]`` to ``[n, 256]``.

    32 bytes of ``q`` hold two groups, the first in their low bits.
    """
    held = blocks[:, 16:].view(-1, 4, 1, 32)
    whole = torch.cat([held & 15, held >> 4], 2).view(-1, 8, 32)
    scale, minimum = six_bits(blocks[:, 4:16])
    factor, offset = halves(blocks, 0) * scale, halves(blocks, 2) * minimum
    return (factor[:, :, None] * whole - offset[:, :, None]).flatten(1)


def six_bits(held: Tensor) -> tuple[Tensor, Tensor]:
    """``s`` and ``m`` of the eight groups, from 12 bytes: uint8 ``[n, 12]`` to two ``[n, 8]``.

    Groups 0 to 3 have theirs in the low six bits of bytes 0 to 3 (``s``) and 4 to 7 (``m``). Of groups 4 to 7 the low four bits lie in
    bytes 8 to 11, ``s`` in their low half and ``m`` in their high one, and the upper two in what bytes 0 to 7 have left.
    """
    first, second, low = held[:, :4], held[:, 4:8], held[:, 8:]
    scale = torch.cat([first & 63, (low & 15) | (first >> 6 << 4)], 1)
    minimum = torch.cat([second & 63, (low >> 4) | (second >> 6 << 4)], 1)
    return scale, minimum


def q5_k_reference(blocks: Tensor) -> Tensor:
    """``d`` 2 bytes, ``dmin`` 2, ``s`` and ``m`` 12, fifth bits 32, low bits 128: ``[n, 176]`` to ``[n, 256]``.

    All but the fifth bits are as in Q4_K; of those, bit ``g`` of each of the 32 bytes is for group ``g``.
    """
    held = blocks[:, 48:].view(-1, 4, 1, 32)
    low = torch.cat([held & 15, held >> 4], 2).view(-1, 8, 32)
    whole = low | torch.stack([blocks[:, 16:48] >> group & 1 for group in range(8)], 1) << 4
    scale, minimum = six_bits(blocks[:, 4:16])
    factor, offset = halves(blocks, 0) * scale, halves(blocks, 2) * minimum
    return (factor[:, :, None] * whole - offset[:, :, None]).flatten(1)


def q6_k_reference(blocks: Tensor) -> Tensor:
    """Low bits 128 bytes, high bits 64, ``s`` 16, ``d`` 2: ``[n, 210]`` to ``[n, 256]``.

    Each half of a block is 64 bytes of low bits and 32 of high ones for four runs of 32 weights: the runs' low bits are the low and then
    the high bits of the 64 bytes, and run ``g`` has bits ``2 g`` and ``2 g + 1`` of the 32.
    """
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    high = torch.cat([high >> 2 * run & 3 for run in range(4)], 2)
    whole = (low | high << 4).int().view(-1, 16, 16) - 32
    factor = halves(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return (factor[:, :, None] * whole).flatten(1)


def q2_k(blocks: Tensor, out: Tensor) -> None:
    """``q2_k_reference`` into fp32 ``out [n, 256]``."""
    factor, offset = halves(blocks, 80) * (blocks[:, :16] & 15), halves(blocks, 82) * (blocks[:, :16] >> 4)
    put(_pairs(blocks[:, 16:80]), factor.view(-1, 1), out, offset.view(-1, 1))


def q3_k(blocks: Tensor, out: Tensor) -> None:
    """``q3_k_reference`` into fp32 ``out [n, 256]``."""
    whole = _pairs(blocks[:, 32:96])
    _add_bits(whole.view(-1, 8, 32), blocks[:, :32], 2)
    factor = halves(blocks, 108) * (six_bits_of_sixteen(blocks[:, 96:108]).float() - 32)
    put(whole.view(torch.int8).sub_(4), factor.view(-1, 1), out)


def q4_k(blocks: Tensor, out: Tensor) -> None:
    """``q4_k_reference`` into fp32 ``out [n, 256]``."""
    _put_groups(blocks, nibbles(blocks[:, 16:].unflatten(1, (4, 32))), out)


def q5_k(blocks: Tensor, out: Tensor) -> None:
    """``q5_k_reference`` into fp32 ``out [n, 256]``."""
    whole = nibbles(blocks[:, 48:].unflatten(1, (4, 32)))
    _add_bits(whole.view(-1, 8, 32), blocks[:, 16:48], 4)
    _put_groups(blocks, whole, out)


def _put_groups(blocks: Tensor, whole: Tensor, out: Tensor) -> None:
    """The integers of Q4_K or Q5_K, whose blocks begin alike, with the scales of their eight groups."""
    scale, minimum = _six_bits_in_words(blocks[:, 4:16]).unbind(1)
    factor, offset = halves(blocks, 0) * scale, halves(blocks, 2) * minimum
    put(whole, factor.view(-1, 1), out, offset.view(-1, 1))


def _pairs(part: Tensor) -> Tensor:
    """``_two_bits`` in a buffer, ``[n, 2, 4, 32]``."""
    held = together("bytes", part.unflatten(1, (2, 32)))
    whole = room("integers", (len(held), 2, 4, 32), held)
    half = room("half", tuple(held.shape), held)
    for run in range(4):
        whole[:, :, run].copy_(torch.bitwise_right_shift(held, 2 * run, out=half).bitwise_and_(3))
    return whole


def _add_bits(whole: Tensor, part: Tensor, place: int) -> None:
    """Or into integers ``[n, 8, 32]``, at bit ``place``, bit ``g`` of the bytes ``[n, 32]`` for run ``g``."""
    held = together("high", part)
    bits = room("bits", tuple(held.shape), held)
    for run in range(8):
        move, by = (torch.bitwise_left_shift, place - run) if run < place else (torch.bitwise_right_shift, run - place)
        whole[:, run].bitwise_or_(move(held, by, out=bits).bitwise_and_(1 << place))


def q6_k(blocks: Tensor, out: Tensor) -> None:
    """``q6_k_reference`` into fp32 ``out [n, 256]``."""
    whole = nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    high = together("bytes", blocks[:, 128:192].unflatten(1, (2, 32)))
    bits = room("half", tuple(high.shape), high)
    for run in range(4):  # its two bits of each byte to places 4 and 5
        move, by = (torch.bitwise_left_shift, 4 - 2 * run) if run < 3 else (torch.bitwise_right_shift, 2)
        whole[:, :, run].bitwise_or_(move(high, by, out=bits).bitwise_and_(48))
    factor = halves(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    put(whole.view(torch.int8).sub_(32), factor.view(-1, 1), out)


def _six_bits_in_words(held: Tensor) -> Tensor:
    """``six_bits`` in fp32, ``[n, 2, 8]``: four groups at a time, whose bytes are one word."""
    first, second, low = together("scales", held).view(torch.int32).unbind(1)
    six, four, upper = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030  # of each byte the bits 0 to 5, 0 to 3, 4 and 5
    words = [first & six, (low & four) | (first >> 2 & upper), second & six, (low >> 4 & four) | (second >> 2 & upper)]
    return torch.stack(words, 1).view(torch.uint8).view(-1, 2, 8).float()
