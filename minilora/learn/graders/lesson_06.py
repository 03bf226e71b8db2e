"""Cases of lesson 6. What is wanted is counted in weights that minilora has packed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from minilora.learn.case import Case, Exercise, Raises
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import QuantizedTensor, empty_quantized

__all__ = ["EXERCISES"]

_FORMATS = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}


def _packed(shape: tuple[int, int], bits: int, blocksize: int, double: bool) -> QuantizedTensor:
    return empty_quantized(shape, QuantConfig(_FORMATS[bits], blocksize, double), torch.float32)


def _bits() -> Iterator[Case]:
    for bits, size in [(4, 64), (4, 32), (3, 64), (2, 256), (8, 4096)]:
        yield Case((bits, size), _packed((4096, 4096), bits, size, False).bits_per_weight, close=1e-12)


def _double() -> Iterator[Case]:
    """A tensor's own mean is 32 bits, which are taken off."""
    for bits, size in [(4, 64), (4, 128), (3, 64), (2, 32)]:
        packed = _packed((4096, 4096), bits, size, True)
        yield Case((bits, size), 8 * (packed.nbytes - 4) / 4096**2, close=1e-12)


def _bytes() -> Iterator[Case]:
    for out_features, in_features, bits, size, double in [
        (2, 64, 4, 64, False), (3, 50, 4, 64, False), (1, 65, 4, 64, False), (1, 3, 4, 64, False), (5, 7, 3, 32, False),
        (2, 64, 4, 64, True), (300, 64, 4, 64, True), (1, 257 * 32, 2, 32, True), (576, 1536, 4, 64, True),
    ]:  # fmt: skip
        nbytes = _packed((out_features, in_features), bits, size, double).nbytes
        yield Case((out_features, in_features, bits, size, double), nbytes)


def _affordable() -> Iterator[Case]:
    for bits, most in [(4, 4.5), (4, 4.4), (4, 5.0), (3, 3.1), (4, 100.0), (4, 4 + 32 / 4096), (2, math.pi)]:
        sizes = [2**power for power in range(5, 13)]
        enough = [size for size in sizes if _packed((4096, 4096), bits, size, False).bits_per_weight <= most]
        yield Case((bits, most), min(enough))
    yield Case((4, 4.0), Raises(ValueError))
    yield Case((3, 3.0078), Raises(ValueError))


EXERCISES = (
    Exercise("bits_per_weight", _bits),
    Exercise("double_quantized", _double),
    Exercise("stored_bytes", _bytes),
    Exercise("affordable_blocksize", _affordable),
)
