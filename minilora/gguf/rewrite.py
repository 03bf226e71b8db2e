"""A GGUF file with updates in its weights: the metadata, the tokenizer and every weight without an update stay as they are, byte for byte.

Next file: ``qlora/quantize_model.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import StateError
from minilora.gguf.file import GGUF
from minilora.gguf.header import ALIGNMENT, Info
from minilora.gguf.kinds import import_gguf
from minilora.gguf.lora import Update, places_of
from minilora.gguf.names import names_in
from minilora.gguf.write import Planned, fill_gguf

__all__ = ["FILE_TYPES", "encoded", "merged_tensors", "rewrite", "type_of"]

FILE_TYPES = {"q8_0": 7, "f16": 1, "f32": 0}  # what general.file_type says of a file mostly so
_TOKENS, _HEAD = "token_embd.weight", "output.weight"
_FULL = ("ffn_gate_inp", "position_embd", "token_types")  # as llama.cpp's converter keeps them


def type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor in a file that is mostly ``kind``: fp32 of vectors and routers, fp16 of rows that are no whole blocks."""
    if len(shape) < 2 or kind == "f32" or any(part in name for part in _FULL):
        return "F32"
    return "Q8_0" if kind == "q8_0" and shape[-1] % 32 == 0 else "F16"


def encoded(name: str, weight: Tensor, kind: str) -> Tensor:
    """A weight in the type of its tensor: numbers, or the bytes of its rows. Raises ``StateError`` for what fp16 does not reach."""
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(weight).all():
        raise StateError(f"{name}: holds NaN or infinity, so nothing is written; load an earlier save")
    if kind == "F32":
        return weight
    if kind == "F16":
        half = weight.half()
        if not torch.isfinite(half).all():
            raise StateError(f"{name}: a number of it is none in f16; write f32 or q8_0")
        return half
    gguf = import_gguf()
    return torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))


def merged_tensors(file: GGUF, updates: list[Update]) -> dict[str, list[tuple[Update, Tensor]]]:
    """Names of tensors to what is added to them: an update, and its B with the rows in the file's order.

    Raises:
        CheckpointError, StateError: it is no update of a tensor of this file, or of a head that is no tensor of its own.
    """
    names = names_in(file)
    found: dict[str, list[tuple[Update, Tensor]]] = {}
    for update in updates:
        for place in places_of(update, names, file.tensors.__contains__):
            rows, name = place.of(update.B, -2), place.name
            if name == _HEAD and _HEAD not in file.tensors:
                if not any(_is_same(update, other) for other in updates if other is not update):
                    raise StateError(
                        f"{update.path}: {file.path} has one table for tokens and head; adapt the embedding with it, or train on a "
                        "model whose head is its own"
                    )
                continue
            shape = (*rows.shape[:-1], update.A.shape[-1])
            if name not in file.tensors or file.tensors[name].shape != shape:
                has = list(file.tensors[name].shape) if name in file.tensors else "nothing"
                raise StateError(
                    f"{update.path}: {file.path} has {has} at {name}, and the adapter is for {list(shape)}"
                )
            found.setdefault(name, []).append((update, rows))
    return found


def _is_same(one: Update, other: Update) -> bool:
    return other.kind == "embedding" and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def rewrite(file: GGUF, updates: list[Update], path: Path, kind: str) -> list[str]:
    """Write the file with the updates in it to ``path``, the changed tensors in ``kind``; returns their names."""
    changed = merged_tensors(file, updates)

    def plan(info: Info) -> Planned:
        if info.name not in changed:
            return info.name, info.shape, info.kind.name, lambda: _as_it_is(file, info)
        chosen = type_of(info.name, info.shape, kind)
        return info.name, info.shape, chosen, lambda: encoded(info.name, _merged(file, changed, info.name), chosen)

    describe = _copied(file, FILE_TYPES[kind] if len(changed) > len(file.tensors) // 2 else None)
    fill_gguf(path, file.architecture, describe, [plan(info) for info in file.tensors.values()])
    return list(changed)


def _merged(file: GGUF, changed: dict[str, list[tuple[Update, Tensor]]], name: str) -> Tensor:
    weight = file.values(name)
    for update, rows in changed[name]:
        weight += rows.float() @ update.A.float()
    return weight


def _as_it_is(file: GGUF, info: Info) -> Tensor:
    raw = file.blocks(info.name)
    if info.kind.name in ("F32", "F16"):
        return raw.view({"F32": torch.float32, "F16": torch.float16}[info.kind.name]).view(info.shape)
    return raw


def _copied(file: GGUF, file_type: int | None) -> Callable[[Any], None]:
    """Every entry of the metadata with its own type, but for the type of the weights."""
    gguf = import_gguf()
    fields = gguf.GGUFReader(file.path).fields  # whose header has been checked

    def describe(writer: Any) -> None:
        for key, entry in fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            kind, inner = entry.types[0], entry.types[-1] if len(entry.types) > 1 else None
            value = entry.contents()
            if key == ALIGNMENT:
                writer.add_custom_alignment(value)
            elif not (inner is not None and len(value) == 0):  # the writer has no empty lists
                value = file_type if key == "general.file_type" and file_type is not None else value
                writer.add_key_value(key, value, kind, inner)

    return describe
