"""A GGUF LoRA, which llama.cpp lays beside the model that it serves: for each tensor ``lora_a [r, in]`` and ``lora_b [out, r]``.

llama.cpp multiplies with ``alpha / r`` of each tensor's own rank, and with 1 where alpha is 0. So alpha is 0 here, the true scale is in B
already, and ranks may differ from tensor to tensor. Experts have one dimension more in front. The table of tokens has its factors the
other way round: ``lora_a [tokens, r]``, whose rows are looked up, and ``lora_b [dimension, r]``. Next file: ``gguf/write.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError, StateError
from minilora.gguf.file import GGUF
from minilora.gguf.names import Names, Place, names_in
from minilora.gguf.words import FACTORS
from minilora.gguf.write import write_gguf

__all__ = ["DTYPES", "Update", "lora_bytes"]

DTYPES = dict(zip(FACTORS, (torch.float32, torch.float16), strict=True))
_TOKENS, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Update:
    """What is added to one weight: ``W + B A``, fp32, the scale in it.

    Attributes:
        path: of the module; of experts their projection's, ``model.layers.0.mlp.experts.down_proj``.
        A: ``[r, in]``, of experts ``[E, r, in]``. B: ``[out, r]``, of experts ``[E, out, r]``. kind: linear, embedding or experts.
    """

    path: str
    A: Tensor
    B: Tensor
    kind: str = "linear"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        return (*self.B.shape[:-1], self.A.shape[-1])


def lora_bytes(updates: list[Update], base: GGUF, dtype: str = "f32") -> bytes:
    """The file, for the model that ``base`` is.

    Raises:
        CheckpointError: the architecture is not tested, or the model has no such tensor, or one of another shape. StateError: llama.cpp
            does not take it: an embedding whose table is the head's too, or a number that fp16 does not reach.
    """
    names = names_in(base)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        for name, factor in _placed(update, names, base):
            tensors[name] = _rounded(name, factor, dtype)

    def describe(writer: Any) -> None:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)

    return write_gguf(names.architecture, describe, tensors)


def _placed(update: Update, names: Names, base: GGUF) -> Iterator[tuple[str, Tensor]]:
    A, B = update.A, update.B
    for place in places_of(update, names, base.tensors.__contains__):
        rows = place.of(B, -2)
        _check(update, place, (*rows.shape[:-1], A.shape[-1]), base)
        if update.kind == "embedding":
            yield f"{place.name}.lora_a", rows
            yield f"{place.name}.lora_b", A.T
        else:
            yield f"{place.name}.lora_a", A
            yield f"{place.name}.lora_b", rows


def places_of(update: Update, names: Names, has: Callable[[str], bool]) -> list[Place]:
    """Where the weight of an update lies in a file that ``has`` such tensors."""
    if update.kind == "experts":
        return names.experts(update.path, update.B.shape[-2], has)
    return [names.place(update.path, len(update.B))]


def _check(update: Update, place: Place, shape: tuple[int, ...], base: GGUF) -> None:
    if place.name in (_TOKENS, _HEAD) and _HEAD not in base.tensors:
        raise StateError(
            f"{update.path}: {base.path} has one table for tokens and head, of which llama.cpp adapts neither half; "
            "leave it out of target_modules, or write a merged file (minilora merge --gguf)"
        )
    if update.kind == "embedding" and place.name != _TOKENS:
        raise StateError(
            f"{update.path}: llama.cpp looks {place.name} up without its adapter; leave it out of target_modules, or write a merged "
            "file (minilora merge --gguf)"
        )
    if place.name not in base.tensors:
        raise CheckpointError(f"{update.path}: {base.path} has no {place.name}; wanted the file of the adapter's model")
    if (found := base.tensors[place.name].shape) != shape:
        raise CheckpointError(
            f"{update.path}: {base.path} has {list(found)} at {place.name}, and the adapter is for {list(shape)}; "
            "wanted the file of the adapter's model"
        )


def _rounded(name: str, factor: Tensor, dtype: str) -> Tensor:
    small = factor.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not math.isfinite(small.abs().max().item()):
        way = "; write it in f32" if torch.isfinite(factor).all() else ", as it is; load an earlier save"
        raise StateError(f"{name}: a number of it is none in {dtype}{way}")
    return small
