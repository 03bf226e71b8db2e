"""The types that a tensor of a GGUF file can have, as the ``gguf`` package lists them. Next file: ``gguf/header.py``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from minilora.errors import MissingPackageError

__all__ = ["PLAIN", "Kind", "import_gguf", "kind_of"]

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Kind:
    """One type: its ``name`` (``Q4_1``), weights in a ``block``, and ``bytes`` that a block takes."""

    name: str
    block: int
    bytes: int

    @property
    def plain(self) -> torch.dtype | None:
        """The dtype of numbers that are no blocks; None for blocks, and for whole numbers."""
        return PLAIN.get(self.name)


def import_gguf() -> Any:
    """The package. Raises ``MissingPackageError`` with the install command."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("reading a GGUF file needs gguf; run 'pip install minilora[gguf]'")
    return importlib.import_module("gguf")


@functools.cache
def kind_of(number: int) -> Kind | None:
    """The type of this number; None for one that the installed package does not know."""
    gguf = import_gguf()
    try:
        name = gguf.GGMLQuantizationType(number)
    except ValueError:
        return None
    return Kind(name.name, *gguf.GGML_QUANT_SIZES[name]) if name in gguf.GGML_QUANT_SIZES else None
