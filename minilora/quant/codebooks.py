"""The quantization formats: a codebook is a table of levels in [-1, 1], and a code is an index into it.

Quantizing divides a block of weights by its largest magnitude (``absmax``), so every value lies in [-1, 1], and stores the index of
the nearest level (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 2)::

    code = argmin_j |level_j - weight / absmax|            weight ~= level_code * absmax

Which levels are best depends on how weights are distributed; NF4's are quantiles of a normal distribution.

NF4 is *pinned*, not derived at run time: regenerating it from the normal quantile function agrees to 1.9e-7, not to the bit, and
files written by bitsandbytes are only read exactly with the very same table. A test derives it. Next file: ``quant/blockwise.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minilora.errors import QuantizationError, nearest
from minilora.files.validate import shown
from minilora.quant.constants import constant

if TYPE_CHECKING:  # the command line names the formats without torch, which each function that computes imports itself
    import torch
    from torch import Tensor

__all__ = [
    "CODEBOOKS",
    "NF4",
    "OF_BITSANDBYTES",
    "Codebook",
    "codebook",
    "dynamic_map",
    "lloyd",
    "quantile_float",
    "register_codebook",
]


@dataclass(frozen=True)
class Codebook:
    """A table of ``2**bits`` levels in [-1, 1], in code order.

    Args:
        name: what ``QuantConfig.format`` calls it.
        levels: fp32 values by code: 4, 8, 16 or 256 of them (2, 3, 4 or 8 bits). They need not be sorted (bitsandbytes' FP4 is not).
        source: where the levels come from.
        signed: the table was made for blocks divided by the value of largest magnitude with its sign, so that it becomes +1.

    Raises:
        QuantizationError: another number of levels, or a level outside [-1, 1].
    """

    name: str
    levels: tuple[float, ...]
    source: str
    signed: bool = False

    def __post_init__(self) -> None:
        if len(self.levels) not in (4, 8, 16, 256):
            raise QuantizationError(
                f"codebook {self.name!r} has {len(self.levels)} levels; wanted 4, 8, 16 or 256 (2, 3, 4 or 8 bits)"
            )
        if not all(-1 <= level <= 1 for level in self.levels):
            raise QuantizationError(
                f"codebook {self.name!r} has levels outside [-1, 1]; divide them by the largest magnitude"
            )

    @property
    def bits(self) -> int:
        """Bits per code."""
        return len(self.levels).bit_length() - 1

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels as fp32 ``[2**bits]`` on ``device`` (a constant of the format, never model state)."""
        return _on_device(self.levels, str(device))

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """``(midpoints [2**bits - 1], codes [2**bits])``: sorted fp32 midpoints and the code of each cell between them."""
        ordered, codes = self.table().sort(stable=True)
        return (ordered[1:] + ordered[:-1]) / 2, codes


@functools.lru_cache(maxsize=64)
def _on_device(levels: tuple[float, ...], device: str) -> Tensor:
    import torch

    return torch.tensor(levels, dtype=torch.float32, device=device)


NF4 = Codebook(
    "nf4",
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3) as bitsandbytes stores it: 8 quantiles above zero, 7 below, "
    "tail 1 - (1/32 + 1/30)/2, divided by the largest",
)  # fmt: skip

FP4 = Codebook(
    "fp4",
    (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
     0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12),
    "bitsandbytes' 4-bit float, in its bit order (sign, then 3 bits), which is not sorted and has two zeros",
)  # fmt: skip

E2M1 = Codebook(
    "e2m1",
    tuple(sign * value / 6 for sign in (1.0, -1.0) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)),
    "OCP microscaling formats v1.0, table 5: 4-bit float with 2 exponent and 1 mantissa bits, divided by its largest value 6",
)

INT4 = Codebook(
    "int4", tuple(max(k, -7) / 7 for k in range(-8, 8)), "symmetric integers -7 .. 7 divided by 7 (code 0 is spare)"
)

INT8 = Codebook(
    "int8",
    tuple(max(k, -127) / 127 for k in range(-128, 128)),
    "symmetric integers -127 .. 127 divided by 127 (code 0 is spare)",
)

SF4 = Codebook(
    "sf4",
    (-1.0, -0.627780676322128, -0.45473609921101954, -0.3343308319744502, -0.23743444376764317, -0.1528987497493392,
     -0.07498248544384259, 0.0, 0.06551309160726367, 0.13296476353060568, 0.20466107422321195, 0.2838347790205141,
     0.3758049337104853, 0.4910756863748391, 0.6567812710946804, 1.0),
    "Student float (Dotzel et al. 2024, arXiv 2405.03103): NF4's recipe with quantiles of Student's t, 5 degrees of freedom",
)  # fmt: skip

AF4 = Codebook(
    "af4",
    (-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0, 0.04273164, 0.12934483,
     0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
    "abnormal float for blocks of 64 (Yoshida 2023, arXiv 2306.06965), as published",
)  # fmt: skip

BOF4S = Codebook(
    "bof4s",
    (-0.856551, -0.6689707, -0.5232914, -0.4002095, -0.2908924, -0.1898998, -0.0938324, 0.0, 0.0887832, 0.1795678,
     0.2743926, 0.3760688, 0.4885735, 0.6185568, 0.7787766, 1.0),
    "block-wise optimal float, signed (Blumenberg et al. 2025, arXiv 2505.06653): the table of least squared error for normal weights "
    "in blocks of 64 divided by their signed largest, with 0 and 1 pinned",
    signed=True,
)  # fmt: skip

NF3 = Codebook(
    "nf3",
    (
        -1.0,
        -0.5350227084855379,
        -0.24693143181157526,
        0.0,
        0.18333748033548752,
        0.3819939543209139,
        0.6229857417143423,
        1.0,
    ),
    "NF4's recipe for 3 bits with its own tail, 1 - (1/16 + 1/14)/2",
)

NF2 = Codebook(
    "nf2", (-1.0, 0.0, 0.4358181645831157, 1.0), "NF4's recipe for 2 bits with its own tail, 1 - (1/8 + 1/6)/2"
)

CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (NF4, FP4, E2M1, INT4, SF4, AF4, BOF4S, NF3, NF2, INT8)}
_OURS = frozenset(CODEBOOKS)
OF_BITSANDBYTES = ("nf4", "fp4")  # the formats that its files hold


def quantile_float(quantile: Callable[[float], float], bits: int, tail: float | None = None) -> list[float]:
    """NF4's recipe for any distribution and width: the derivation of NF2, NF3, NF4 and SF4.

    ``2**(bits-1)`` even quantiles from ``tail`` down to (not with) 1/2 above zero, one fewer below, zero itself; divided by the largest.

    Args:
        quantile: inverse distribution function, such as ``scipy.stats.norm.ppf``. bits: width of a code.
        tail: the outermost probability; default ``1 - (1/2**(bits+1) + 1/(2**(bits+1) - 2)) / 2``, NF4's rule.
    """
    half = 2 ** (bits - 1)
    edge = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2 if tail is None else tail

    def side(count: int) -> list[float]:
        return [quantile(edge + (0.5 - edge) * place / count) for place in range(count)]

    levels = sorted([*(-value for value in side(half - 1)), 0.0, *side(half)])
    return [level / levels[-1] for level in levels]


def lloyd(weights: Tensor, bits: int = 4, blocksize: int = 64, rounds: int = 200, name: str = "fitted") -> Codebook:
    """A table fitted to given weights: Lloyd's algorithm on their normalised values, each weighted by the square of its block's scale.

    Args:
        weights: any shape, at least one whole block; what does not fill a block is left out.

    Returns:
        A sorted codebook that minimises the squared error of these weights at this blocksize (a local minimum).
    """
    import torch

    whole = weights.numel() // blocksize * blocksize
    if whole == 0:
        raise QuantizationError(
            f"lloyd: {weights.numel()} weights fill no block of {blocksize}; give more, or a smaller blocksize"
        )
    blocks = weights.detach().reshape(-1)[:whole].double().view(-1, blocksize)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    values, mass = (blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten()
    levels = torch.quantile(
        values[:: max(1, len(values) // 100_000)], (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    )
    for _ in range(rounds):
        cell = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros_like(levels).index_add_(0, cell, mass)
        new = torch.zeros_like(levels).index_add_(0, cell, mass * values) / total.clamp(min=1e-300)
        new = torch.where(total > 0, new, levels).sort().values
        if torch.equal(new, levels):
            break
        levels = new
    return Codebook(
        name, tuple(levels.clamp(-1, 1).tolist()), f"Lloyd's algorithm on {whole} weights, blocksize {blocksize}"
    )


def codebook(name: str | Codebook) -> Codebook:
    """The codebook called ``name``; a ``Codebook`` is returned as it is.

    Raises:
        QuantizationError: no such format; the message has the known names.
    """
    if isinstance(name, Codebook):
        return name
    if not isinstance(name, str) or name not in CODEBOOKS:
        close = nearest(name if isinstance(name, str) else shown(name), CODEBOOKS)
        raise QuantizationError(f"format={shown(name)} is not known; the closest known ones are {close}")
    return CODEBOOKS[name]


def register_codebook(book: Codebook) -> Codebook:
    """Make a table of your own known under its name, for ``QuantConfig``, ``--quant`` and files; returns it.

    Raises:
        QuantizationError: no codebook, a name that is no plain word, or one that is taken by another of minilora's tables.
    """
    if not isinstance(book, Codebook):
        raise QuantizationError(f"register_codebook: a {type(book).__name__}; wanted a Codebook")
    if not (isinstance(book.name, str) and book.name.isidentifier() and len(book.name) <= 64) or book.name == "none":
        raise QuantizationError(
            f"codebook name {shown(book.name)}: wanted letters, digits and '_', 64 at most, and not 'none'"
        )
    if book.name in _OURS and book != CODEBOOKS[book.name]:
        raise QuantizationError(f"codebook name {book.name!r} is taken; register yours under another name")
    CODEBOOKS[book.name] = book
    return book


@constant
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 sorted fp32 levels that hold scales in 8 bits (double quantization; Dettmers 2015, arXiv 1511.04561, section 1.3).

    Seven decades of both signs; decade ``j`` has ``2**j`` midpoints of an even grid over [0.1, 1], times ``10**(j - 6)``;
    0 and 1 complete it. For what is never negative (``signed=False``, the second moment of an 8-bit optimizer; Dettmers et al. 2022,
    arXiv 2110.02861, section 2.2) the sign's bit makes each grid twice as fine.
    """
    import torch

    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        levels += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(levels), dtype=torch.float32)
