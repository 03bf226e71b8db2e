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
from minilora.quant.stack import QuantizedStack

__all__ = ["from_disk", "to_disk"]

_MARK = STATES[1]


def to_disk(weight: QuantizedTensor | QuantizedStack) -> dict[str, Tensor]:
    """Tensors by what is appended to the weight's name ("" for the codes). Raises ``QuantizationError`` for what is not 2-D.

    Experts are as bitsandbytes' ``replace_parameter_4bit`` writes a 3-D parameter; filled up, in the own layout, with their true shape.
    """
    if isinstance(weight, QuantizedStack):
        own, known = weight.stored, {} if weight.is_whole else {"experts": list(weight.shape)}
    else:
        own, known = weight, {}
    if storable(own.book, own.blocksize) and not known:
        return to_bitsandbytes(own)
    if len(own.shape) != 2 and not isinstance(weight, QuantizedStack):
        raise QuantizationError(f"a packed weight of {len(own.shape)} dimensions cannot be stored; wanted 2")
    return laid_out(own, _MARK, {"bits": own.book.bits, "signed": own.book.signed, **known})


def from_disk(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor | QuantizedStack:
    """The inverse. Raises ``CheckpointError`` as ``from_bitsandbytes``, and for a codebook that has other levels here."""
    if not any(suffix.startswith(_MARK) for suffix in tensors):
        return _stack(from_bitsandbytes(tensors, name), None, name)
    kind, where = named_state(tensors, name, _MARK)
    state = state_content(tensors, name, _MARK, kind)
    bits, signed = state.get("bits"), state.get("signed")
    if type(bits) is not int or bits not in (2, 3, 4, 8) or type(signed) is not bool or not kind.isidentifier():
        raise CheckpointError(f"{where}: says bits={str(bits)[:20]}, signed={str(signed)[:20]}; the file is damaged")
    weight = restored(tensors, name, _book(kind, table_of(tensors, name, 2**bits), signed, where), state)
    return _stack(weight, state.get("experts"), name)


def _stack(weight: QuantizedTensor, experts: Any, name: str) -> QuantizedTensor | QuantizedStack:
    """The experts in a stored weight that has three dimensions, or says what its rows are; any other as it is."""
    if experts is None and len(weight.shape) == 2:
        return weight
    shape = list(weight.shape) if experts is None else experts
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
    each = weight.shape.numel() // weight.shape[0]
    if (
        not whole
        or shape[0] != weight.shape[0]
        or each % weight.blocksize
        or not 0 <= each - shape[1] * shape[2] < weight.blocksize
    ):
        raise CheckpointError(
            f"{name}: found {list(weight.shape)} as experts of {str(shape)[:60]}, and blocks of {weight.blocksize} that cross from one "
            "into the next; pack the dense model again"
        )
    return QuantizedStack(weight, torch.Size(shape))


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
