"""A quantized weight on disk: in bitsandbytes' layout where that has one, else in minilora's own, which is like it.

The own layout is for every codebook, of 2, 3, 4 or 8 bits, and for blocks of 32 weights. The state is called
``W.quant_state.minilora__NAME`` and says ``bits`` and ``signed`` beside what bitsandbytes' says; ``W.quant_map`` holds the levels. So a
file can be read without the code that made the codebook. Next file: ``linear/layers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError, QuantizationError
from minilora.quant.bnb import (
    STATES,
    from_bitsandbytes,
    laid_out,
    named_state,
    restored,
    state_content,
    storable,
    table_of,
    to_bitsandbytes,
)
from minilora.quant.codebooks import CODEBOOKS, Codebook
from minilora.quant.quantized import QuantizedTensor

__all__ = ["from_disk", "to_disk"]

_MARK = STATES[1]


def to_disk(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Tensors by what is appended to the weight's name ("" for the codes). Raises ``QuantizationError`` for what is not 2-D."""
    if storable(weight.book, weight.blocksize):
        return to_bitsandbytes(weight)
    if len(weight.shape) != 2:
        raise QuantizationError(f"a packed weight of {len(weight.shape)} dimensions cannot be stored; wanted 2")
    return laid_out(weight, _MARK, {"bits": weight.book.bits, "signed": weight.book.signed})


def from_disk(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """The inverse. Raises ``CheckpointError`` as ``from_bitsandbytes``, and for a codebook that has other levels here."""
    if not any(suffix.startswith(_MARK) for suffix in tensors):
        return from_bitsandbytes(tensors, name)
    kind, where = named_state(tensors, name, _MARK)
    state = state_content(tensors, name, _MARK, kind)
    bits, signed = state.get("bits"), state.get("signed")
    if type(bits) is not int or bits not in (2, 3, 4, 8) or type(signed) is not bool or not kind.isidentifier():
        raise CheckpointError(f"{where}: says bits={str(bits)[:20]}, signed={str(signed)[:20]}; the file is damaged")
    return restored(tensors, name, _book(kind, table_of(tensors, name, 2**bits), signed, where), state)


def _book(kind: str, levels: Tensor, signed: bool, where: str) -> Codebook:
    """The codebook of this name if there is one here, or as the file has it."""
    known: Any = CODEBOOKS.get(kind)
    if known is not None:
        if known.signed != signed or not torch.equal(known.table(), levels):
            raise CheckpointError(
                f"{where}: was packed with other levels than the codebook {kind!r} has here; leave out the plugin that registers it, or "
                "register it under another name"
            )
        return known
    try:
        return Codebook(kind, tuple(levels.tolist()), "a packed model's own table", signed)
    except QuantizationError as error:
        raise CheckpointError(f"{where}: {error}; the file is damaged") from None
