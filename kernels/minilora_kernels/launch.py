"""Which tile sizes a kernel is launched with: a table by architecture, no search at run time.

Every entry is compiled and checked by ``kernels/aot.py``; those of sm_90 have been timed (an H200,
``benchmarks/results/gpu_nvidia_h200.csv``), the others not yet. No search at run time means that a launch inside a CUDA graph capture is
like any other. Next file: ``dequant.py``.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
_PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # A100, 4090, H100, B200, MI300X


@dataclass(frozen=True)
class Tile:
    """Tile sizes of a product: ``BM`` rows of the input, ``BN`` rows and ``BK`` columns of the weight, warps, pipeline stages."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """The tile's sizes as a kernel's constants, and how it is compiled."""
        sizes = {"BM": self.BM, "BN": self.BN, "BK": self.BK}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


LINEAR: dict[str, list[Tile]] = {
    "sm_80": [Tile(128, 128, 64, 8, 3)],
    "sm_89": [Tile(128, 128, 64, 8, 3)],
    "sm_90": [Tile(128, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3)],
    "sm_100": [Tile(128, 128, 64, 8, 3)],
    "gfx942": [Tile(128, 128, 64, 8, 2)],
    "cpu": [Tile(32, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1)],
}
DGRAD: dict[str, list[Tile]] = {
    "sm_80": [Tile(64, 64, 64, 4, 3), Tile(128, 64, 128, 8, 3)],
    "sm_89": [Tile(64, 64, 64, 4, 3), Tile(128, 64, 128, 8, 3)],
    "sm_90": [Tile(64, 64, 64, 4, 4), Tile(128, 64, 128, 8, 3), Tile(256, 64, 128, 8, 3)],
    "sm_100": [Tile(64, 64, 64, 4, 4), Tile(128, 64, 128, 8, 3)],
    "gfx942": [Tile(64, 64, 64, 4, 2), Tile(128, 64, 128, 8, 2)],
    "cpu": [Tile(32, 64, 64, 4, 1), Tile(64, 64, 128, 4, 1)],
}
_SMALL = [Tile(16, 128, 64, 4, 4), Tile(32, 128, 64, 4, 4), Tile(64, 128, 64, 8, 4)]
GEMV: dict[str, list[Tile]] = dict.fromkeys(ARCHS, _SMALL) | {
    "gfx942": [Tile(16, 128, 64, 4, 2), Tile(32, 128, 64, 4, 2), Tile(64, 128, 64, 8, 2)],  # 64 KB of shared memory
    "cpu": [Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1)],
}
# Rows of a tile of which, with experts, Triton makes nothing (sm_100), or a loop thrice as long as of twice the rows (gfx942).
_TOO_FEW = {"sm_100": (16, 32), "gfx942": (16,)}
# Rows of the input up to which a fused kernel is taken, forward and backward; above, it is decoded first and the library multiplies.
# On an H200 the fused forward is 1.3 to 2.1 times as fast up to 64 rows. Of 51 other products measured, forward and backward, four are
# faster fused (by up to a third), one is equal, and 46 are 0.35 to 0.8 times as fast.
FUSED_ROWS: dict[str, tuple[int, int]] = {"sm_90": (64, 0)}
GROUP = 8  # rows of tiles that are walked together, so that they share the second-level cache
RANKS = (16, 32, 64)  # ranks are padded to one of these; a larger one is multiplied apart


def pick(tiles: list[Tile], arch: str, rows: int, columns: int, side: str, experts: int = 1) -> Tile:
    """The largest tile that still gives nearly every processor a program and is at most half empty; the smallest if none does.

    Args:
        rows, columns: of the result. side: "BN" or "BK", the tile's size along the result's columns.
        experts: weights that share the rows, evenly as far as anybody knows; a tile has rows of one of them.
    """
    enough, each = 0.9 * _PROCESSORS.get(arch, 1), -(-rows // experts)
    good = (tile for tile in reversed(tiles) if 2 * each > tile.BM
            and experts * -(-each // tile.BM) * -(-columns // getattr(tile, side)) >= enough)  # fmt: skip
    return next(good, tiles[0])


def grouped_tiles(arch: str) -> list[Tile]:
    """Those of the forward product with experts, fewest rows first: an expert may have few, for which ``GEMV`` has the tiles, or many."""
    tiles = (tile for tile in [*GEMV[arch], *LINEAR[arch]] if tile.BM not in _TOO_FEW.get(arch, ()))
    return sorted(tiles, key=lambda tile: tile.BM)


def fused_wins(arch: str, rows: int, forward: bool) -> bool:
    """Whether decoding inside the product is faster than before it; where nobody has measured it, yes, since it holds nothing dense."""
    return arch not in FUSED_ROWS or rows <= FUSED_ROWS[arch][0 if forward else 1]


def padded_rank(r: int) -> int | None:
    """The rank that the kernels are compiled for, 0 for none, or None if ``r`` is beyond them."""
    return 0 if r == 0 else next((size for size in RANKS if r <= size), None)


def splits(arch: str, programs: int, most: int) -> int:
    """Into how many parts a reduction is split so that twice as many programs run as there are processors: a power of two."""
    wanted = 2 * _PROCESSORS.get(arch, 1) // max(1, programs)
    return 1 << max(0, min(wanted, most, 32).bit_length() - 1)


def lookup_for(arch: str, dtype: torch.dtype, bits: int) -> str:
    """``prmt`` where the byte-permute lookup exists, else ``load``."""
    return "prmt" if arch.startswith("sm_") and bits == 4 and dtype in (torch.bfloat16, torch.float16) else "load"


def arch_of(device: torch.device) -> str | None:
    """The row of the tables for a device; None where there is no row (older than Ampere, other AMD cards)."""
    return "cpu" if device.type == "cpu" else _cuda_arch(device.index or 0)


@functools.lru_cache(maxsize=64)
def _cuda_arch(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name in LINEAR else None
    known = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    major, minor = properties.major, properties.minor
    if (major, minor) in known:
        return known[major, minor]
    return "sm_89" if major in (8, 12) else None  # 8.6, 8.9, 12.x: about 100 KB of shared memory


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there: a CUDA (or HIP) device with a row in the tables, fp16, bf16 or fp32 input."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return device.type == "cuda" and dtype in floats and arch_of(device) is not None


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, which is where triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
