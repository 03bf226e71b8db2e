"""The quantization formats: a codebook is a table of levels in [-1, 1], and a code is an index into it.

Quantizing divides a block of weights by its largest magnitude (``absmax``), so every value lies in [-1, 1], and stores the index of
the nearest level. Which levels are best depends on how weights are distributed; NF4's are quantiles of a normal distribution.

NF4 is *pinned*, not derived at run time: regenerating it from the normal quantile function agrees to 1.9e-7, not to the bit, and
files written by bitsandbytes are only read exactly with the very same table. A test derives it. Next file: ``quantize.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.errors import QuantizationError, nearest

__all__ = ["CODEBOOKS", "NF4", "Codebook", "codebook", "dynamic_map"]


@dataclass(frozen=True)
class Codebook:
    """A table of 16 levels in [-1, 1], in code order.

    Args:
        name: what ``QuantConfig.format`` calls it.
        levels: fp32 values by code. They need not be sorted (bitsandbytes' FP4 is not).
        source: where the levels come from.

    Raises:
        QuantizationError: there are not 16 levels, or a level lies outside [-1, 1].
    """

    name: str
    levels: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.levels) != 16:
            raise QuantizationError(
                f"codebook {self.name!r} has {len(self.levels)} levels; wanted 16, for codes of 4 bits"
            )
        if not all(-1 <= level <= 1 for level in self.levels):
            raise QuantizationError(
                f"codebook {self.name!r} has levels outside [-1, 1]; divide them by the largest magnitude"
            )

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels as fp32 ``[16]`` on ``device`` (a constant of the format, never model state)."""
        return _on_device(self.levels, str(device))

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """``(midpoints [15], codes [16])``: sorted fp32 midpoints and the code of each cell between them."""
        ordered, codes = self.table().sort(stable=True)
        return (ordered[1:] + ordered[:-1]) / 2, codes


@functools.lru_cache(maxsize=64)
def _on_device(levels: tuple[float, ...], device: str) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


NF4 = Codebook(
    "nf4",
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3) as bitsandbytes stores it: 8 quantiles above zero, 7 below, "
    "tail 1 - (1/32 + 1/30)/2, divided by the largest",
)  # fmt: skip

CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (NF4,)}


def codebook(name: str) -> Codebook:
    """The codebook called ``name``.

    Raises:
        QuantizationError: no such format; the message has the known names.
    """
    if name not in CODEBOOKS:
        raise QuantizationError(f"format={name!r} is not known; the closest known ones are {nearest(name, CODEBOOKS)}")
    return CODEBOOKS[name]


@functools.lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The 256 sorted fp32 levels that hold scales in 8 bits (double quantization; Dettmers 2015, arXiv 1511.04561, section 1.3).

    Seven decades of both signs; decade ``j`` has ``2**j`` midpoints of an even grid over [0.1, 1], times ``10**(j - 6)``;
    0 and 1 complete it.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        levels += middles + [-middle for middle in middles]
    return torch.tensor(sorted(levels), dtype=torch.float32)
