"""What a packed weight is, and the small tables that decode it.

    packed   uint8 [N*K*bits/8]   row-major [N, K]; the first code of a byte in its highest bits (bitsandbytes' order)
    absmax   fp32 [ceil(N*K/blocksize)], or uint8 with double quantization:
             absmax = nested_levels[code] * nested_absmax[block // 256] + nested_offset

Nothing is copied or reordered: these are the very bytes of a bitsandbytes checkpoint. Next file: ``lookup.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora_kernels.launch import lookup_for

NESTED_BLOCKSIZE = 256  # scales that share a scale of their own


@dataclass(frozen=True)
class Weight:
    """A quantized weight ``[N, K]``.

    Args:
        packed: uint8, contiguous. absmax: fp32 ``[blocks]``, or uint8 ``[blocks]`` with double quantization.
        levels: the codebook, 16 values (4 bits) or 4 values (2 bits), in code order, in [-1, 1].
        shape: ``(N, K)``. blocksize: weights per scale, a power of two from 32.
        nested_levels, nested_absmax, nested_offset: fp32 ``[256]``, ``[ceil(blocks/256)]``, ``[1]``; None without double quantization.

    Raises:
        ValueError: a size or dtype does not fit the others (checked before any kernel may read beyond an end).
    """

    packed: Tensor
    absmax: Tensor
    levels: tuple[float, ...]
    shape: tuple[int, int]
    blocksize: int = 64
    nested_levels: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        blocks = -(-rows * columns // self.blocksize)
        wanted = {
            "packed": (self.packed, torch.uint8, -(-rows * columns * self.bits // 8)),
            "absmax": (self.absmax, torch.uint8 if self.nested else torch.float32, blocks),
        }
        if self.nested:
            wanted["nested_levels"] = (self.nested_levels, torch.float32, 256)
            wanted["nested_absmax"] = (self.nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
            wanted["nested_offset"] = (self.nested_offset, torch.float32, 1)
        if len(self.levels) not in (4, 16):
            raise ValueError(f"levels: found {len(self.levels)} / wanted 16 or 4; 3 and 8 bits have no kernels here")
        if self.blocksize < 32 or self.blocksize & (self.blocksize - 1):
            raise ValueError(f"blocksize: found {self.blocksize} / wanted a power of two from 32")
        for name, (tensor, dtype, count) in wanted.items():
            if tensor is None or tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
                found = None if tensor is None else (tensor.dtype, tensor.numel())
                raise ValueError(f"{name}: found {found} / wanted contiguous {dtype} of {count} elements")

    @property
    def bits(self) -> int:
        """Bits per code, 4 or 2."""
        return len(self.levels).bit_length() - 1

    @property
    def nested(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    def pointers(self) -> dict[str, Tensor]:
        """Arguments of every kernel that decodes; without double quantization the unused three are any valid address."""
        if not self.nested:
            return dict.fromkeys(("code2", "absmax2", "offset"), self.absmax) | {
                "packed": self.packed,
                "absmax": self.absmax,
            }
        return {
            "packed": self.packed,
            "absmax": self.absmax,
            "code2": self.nested_levels,
            "absmax2": self.nested_absmax,
            "offset": self.nested_offset,
        }


def decoding(w: Weight, like: Tensor, arch: str) -> dict[str, Any]:
    """Arguments of a kernel that decodes ``w`` inside a product with ``like``: what is stored, its table, and the constants of both."""
    lookup = lookup_for(arch, like.dtype, w.bits)
    book = table(w.levels, like.dtype, str(like.device), lookup)
    stored = w.pointers() | {"words": book.words, "levels": book.levels, "inverse": book.inverse}
    return stored | {"SB": w.blocksize, "BITS": w.bits, "LOOKUP": lookup, "NESTED": w.nested}


@dataclass(frozen=True)
class Table:
    """A codebook for one dtype: ``words`` int32 ``[8]`` (see ``plane_words``), ``levels`` fp32, and what a scale is multiplied by."""

    words: Tensor
    levels: Tensor
    inverse: float


@functools.lru_cache(maxsize=64)
def table(levels: tuple[float, ...], dtype: torch.dtype, device: str, lookup: str) -> Table:
    """The table of ``levels`` on ``device``, made once. ``lookup="prmt"``: prescaled and rounded; ``"load"``: fp32 as they are."""
    factor = prescale(levels, dtype) if lookup == "prmt" else 1.0
    words = plane_words(tuple(factor * level for level in levels), dtype) if lookup == "prmt" else [0] * 8
    return Table(
        torch.tensor(words, dtype=torch.int32, device=device),
        torch.tensor(levels, dtype=torch.float32, device=device),
        1 / factor,
    )


def prescale(levels: tuple[float, ...], dtype: torch.dtype) -> float:
    """The factor in [1, 2) that makes ``levels * factor`` lose least when rounded to ``dtype``.

    The scales are divided by it, which costs nothing. For NF4 in bf16 it is about 1.44 and takes the error of the rounded table from
    1.06e-3 to 0.63e-3 of the weights, all codes equally frequent.
    """
    factors = 1 + torch.arange(4096, dtype=torch.float64, device="cpu").unsqueeze(1) / 4096
    exact = torch.tensor(levels, dtype=torch.float64, device="cpu") * factors
    error = ((exact.to(dtype).double() - exact) / factors).square().sum(1)
    return float(factors[error.argmin(), 0])


def plane_words(levels: tuple[float, ...], dtype: torch.dtype) -> list[int]:
    """16 levels in two bytes each, as eight words for the byte-permute instruction.

    Words 0-3 hold the high bytes of levels 0-15, four to a word, the first in the lowest byte; words 4-7 the low bytes. Signed int32.
    """
    # The device is named: a model may be loading in `torch.device("meta")`, and the table is kept for everybody.
    rounded = torch.tensor(levels, dtype=torch.float64, device="cpu").to(dtype).view(torch.int16)
    bits = [int(value) & 0xFFFF for value in rounded]
    planes = [bytes(value >> 8 for value in bits), bytes(value & 255 for value in bits)]
    return [int.from_bytes(plane[i : i + 4], "little", signed=True) for plane in planes for i in range(0, 16, 4)]
