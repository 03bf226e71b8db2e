"""What the doctor knows of the base model: its config, where it lies on this disk, and the names and shapes of its layers, without a
weight. Next file: ``doctor/base.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import MiniLoraError
from minilora.files.read import refuse_path
from minilora.hf.known_base import on_disk
from minilora.hf.load import resolve, skeleton
from minilora.linear.layers import in_out_features, kind_of
from minilora.lora.bare import Bare

__all__ = ["Base", "Module", "base_of"]

_LONGEST = 1000  # signs of a name


@dataclass(frozen=True)
class Module:
    """``kind`` as ``kind_of`` says, "" for one without adapters; ``sides`` are (in, out); ``shapes`` of its own parameters, by name."""

    kind: str
    sides: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Base:
    """``name`` as it was given, ``place`` of its files (a folder, or a GGUF file) or None, ``modules`` by path, rows of its embedding (0:
    unknown), whether the head is tied to it.
    """

    name: str
    place: Path | None
    modules: dict[str, Module]
    vocabulary: int
    tied: bool


def base_of(named: object, model: str | None) -> Base | None:
    """The base by its config: of ``model`` where that is given, else what the adapter names, if it is on this disk.

    Raises:
        CheckpointError: ``model`` is given, and there is none, or none of that kind.
    """
    if model is not None:
        return _base(model, skeleton(model))
    place = local(named)
    if place is None or find_spec("transformers") is None:
        return None
    try:
        return _base(place, skeleton(place))
    except MiniLoraError:
        return None


def local(named: object) -> str | None:
    """Where the files of a base lie that the adapter names, if it is on this disk; what is no name of a file is on none."""
    if not isinstance(named, str) or not named.isprintable() or len(named) > _LONGEST:
        return None
    try:
        refuse_path(named)
        return on_disk(named)
    except (MiniLoraError, OSError):
        return None


def _base(name: str, model: Any) -> Base:
    bare = Bare(model)
    modules = {path: _module(bare, module) for path, module in bare.named_modules() if path}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    place = Path(resolve(name)) if local(name) == name else Path(local(name) or "")
    return Base(
        name,
        place if place.name and place.exists() else None,
        modules,
        len(table.weight) if table is not None else 0,
        head is not None and table is not None and head.weight is table.weight,
    )


def _module(bare: Bare, module: Any) -> Module:
    kind = kind_of(module) or ""
    sides = in_out_features(module) if kind in ("linear", "embedding", "convolution") else (0, 0)
    return Module(kind, sides, {name: tuple(tensor.shape) for name, tensor in bare.parameters_of(module)})
