"""The table of GGUF's block formats that are decoded here: sizes, and what turns a block's bytes into weights.

A block never crosses from one row of a weight into the next, so rows can be taken, left out and put into another order as they are.
Next file: ``quant/gguf/pieces.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from minilora.errors import QuantizationError, nearest
from minilora.files.validate import shown
from minilora.quant.gguf import blocks32, blocks256, slack

__all__ = ["FORMATS", "GGUFFormat", "gguf_format"]


@dataclass(frozen=True)
class GGUFFormat:
    """One of GGUF's ways to keep a block of weights.

    Attributes:
        name: what ggml calls the type. weights: in a block. nbytes: of a block. halves: at which of its bytes an fp16 number begins.
        decode: ``(blocks uint8 [n, nbytes], out fp32 [n, weights])``. reference: the same as a formula of what it is given.
        slack: ``blocks`` to fp32 ``[n, groups]``, how far the weights of each group may lie from those that were packed.
    """

    name: str
    weights: int
    nbytes: int
    halves: tuple[int, ...]
    decode: Callable[[Tensor, Tensor], None]
    reference: Callable[[Tensor], Tensor]
    slack: Callable[[Tensor], Tensor]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of the scales included."""
        return 8 * self.nbytes / self.weights


FORMATS: dict[str, GGUFFormat] = {
    each.name: each
    for each in (
        GGUFFormat("Q4_0", 32, 18, (0,), blocks32.q4_0, blocks32.q4_0_reference, slack.one_scale),
        GGUFFormat("Q4_1", 32, 20, (0, 2), blocks32.q4_1, blocks32.q4_1_reference, slack.one_scale),
        GGUFFormat("Q5_0", 32, 22, (0,), blocks32.q5_0, blocks32.q5_0_reference, slack.one_scale),
        GGUFFormat("Q5_1", 32, 24, (0, 2), blocks32.q5_1, blocks32.q5_1_reference, slack.one_scale),
        GGUFFormat("Q8_0", 32, 34, (0,), blocks32.q8_0, blocks32.q8_0_reference, slack.one_scale),
        GGUFFormat("Q2_K", 256, 84, (80, 82), blocks256.q2_k, blocks256.q2_k_reference, slack.q2_k),
        GGUFFormat("Q3_K", 256, 110, (108,), blocks256.q3_k, blocks256.q3_k_reference, slack.q3_k),
        GGUFFormat("Q4_K", 256, 144, (0, 2), blocks256.q4_k, blocks256.q4_k_reference, slack.q4_k),
        GGUFFormat("Q5_K", 256, 176, (0, 2), blocks256.q5_k, blocks256.q5_k_reference, slack.q5_k),
        GGUFFormat("Q6_K", 256, 210, (208,), blocks256.q6_k, blocks256.q6_k_reference, slack.q6_k),
    )
}


def gguf_format(name: str) -> GGUFFormat:
    """The format of this name. Raises ``QuantizationError`` with the known ones for another."""
    if not isinstance(name, str) or name not in FORMATS:
        close = nearest(name if isinstance(name, str) else shown(name), FORMATS)
        raise QuantizationError(f"GGUF type {shown(name)} is not decoded here; the closest that are: {close}")
    return FORMATS[name]
