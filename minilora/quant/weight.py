"""What every packed weight can do, whatever its format: ``PackedWeight``. Products, merging and reports ask for nothing else.

    bytes --(decoder)--> weights in fp32, a range at a time --(rounded once)--> their dtype

Next file: ``quant/quantized.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.quant.lookup import scratch

__all__ = ["CHUNK", "Decoder", "PackedWeight"]

CHUNK = 1 << 18  # weights worked on at a time: a few MB of scratch, whatever the layer

Decoder = Callable[[int, Tensor], None]


class PackedWeight(ABC):
    """A frozen weight in few bits.

    Attributes:
        packed: its bytes, uint8, or what is left beside the scales. shape: of the weight.
        dtype: what ``dequantize()`` returns.
    """

    packed: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    @abstractmethod
    def format(self) -> str:
        """Its name: of a codebook, or of a GGUF type."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Weights that are decoded together: a range of the flattened weight begins at a multiple of them."""

    @abstractmethod
    def parts(self) -> tuple[Tensor | None, ...]:
        """All tensors that it holds; None for one that this format could have."""

    @abstractmethod
    def with_parts(self, parts: Sequence[Tensor | None]) -> Self:
        """The same format over other tensors: the inverse of ``parts``."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The values of its codes; none where its bytes are no codes of a table. With ``format`` and ``unit`` all that the bytes mean."""
        return ()

    @abstractmethod
    def decoder(self) -> Decoder:
        """``decode(start, out)``: weights ``start .. start + n`` of the flattened weight into contiguous fp32 ``out [n]``.

        ``start`` is a multiple of ``unit``. What can be made ready once for the whole weight is.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(part.numel() * part.element_size() for part in self.parts() if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Exact storage per weight in bits, scales included (4.127 for NF4, blocksize 64, double quantization)."""
        return 8 * self.nbytes / max(1, self.shape.numel())

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dense weight, ``shape``, in ``dtype`` (default: its own): computed in fp32 and rounded once.

        ``out``: a contiguous tensor of that shape to write into, which is several times faster for a large weight than fresh memory;
        its dtype counts then. Raises ``QuantizationError`` if it does not fit.
        """
        if out is not None and (out.shape != self.shape or not out.is_contiguous() or out.device != self.packed.device):
            raise QuantizationError(
                f"out is {tuple(out.shape)} on {out.device}; wanted a contiguous {tuple(self.shape)} on {self.packed.device}"
            )
        dtype = out.dtype if out is not None else dtype or self.dtype
        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device) if out is None else out
        flat, decode = out.view(-1), self.decoder()
        # Every chunk starts and ends a few parallel loops, which costs more than a cold cache where cores are shared.
        chunk = CHUNK if torch.get_num_threads() == 1 else 8 * CHUNK
        for start in range(0, flat.numel(), chunk):
            stop = min(start + chunk, flat.numel())
            if dtype == torch.float32:
                decode(start, flat[start:stop])
            else:
                part = (
                    scratch("part", stop - start, torch.float32)
                    if flat.device.type == "cpu"
                    else torch.empty(stop - start, dtype=torch.float32, device=flat.device)
                )
                decode(start, part)
                flat[start:stop] = part
        return out
