"""Lesson 6. Counting bits: one solution."""

import math


def bits_per_weight(bits: int, blocksize: int) -> float:
    return bits + 32 / blocksize


def double_quantized(bits: int, blocksize: int) -> float:
    return bits + 8 / blocksize + 32 / (blocksize * 256)


def stored_bytes(out_features: int, in_features: int, bits: int, blocksize: int, double: bool) -> int:
    count = out_features * in_features
    blocks = math.ceil(count / blocksize)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 if double else 4 * blocks
    return math.ceil(count * bits / 8) + scales


def affordable_blocksize(bits: int, most: float) -> int:
    for power in range(5, 13):
        if bits_per_weight(bits, 2**power) <= most:
            return int(2**power)
    raise ValueError(f"{most} bits a weight are too few for codes of {bits}")
