"""The entries of a GGUF file that say what its model computes: each of its type, and each known or refused by name.

llama.cpp reads an entry as one type and ends at another; transformers believes what comes. llama.cpp takes a list with a number for each
layer for some of them, too, which is a number here where all are equal. Next file: ``hf/gguf_config.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.validate import shown
from minilora.gguf.file import GGUF

__all__ = ["entries"]

_FRACTIONS = ("epsilon", "freq_base", "freq_base_swa", "scaling.factor", "scale_linear", "softcapping")
_FLAGS = ("use_parallel_residual", "rope.scaling.finetuned")
_TEXTS = ("rope.scaling.type",)
# Entries that change nothing whatever they say, as long as angles are stretched evenly or not at all, which ``rope.scaling.type`` says.
_IDLE = ("rope.scaling.original_context_length", "rope.scaling.finetuned")
_IDLE_AT: dict[str, Any] = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.attn_factor": 1.0}


def entries(file: GGUF, known: Container[str]) -> dict[str, Any]:
    """Endings of the entries under the architecture's name to their values.

    Args:
        known: endings that the caller reads.

    Raises:
        CheckpointError: an entry is of another type, differs from layer to layer, or is known to nobody and may change what is computed.
    """
    start, found = f"{file.architecture}.", dict[str, Any]()
    for name, value in file.metadata.items():
        key = name.removeprefix(start)
        if key == name or key in _IDLE or (key in _IDLE_AT and _IDLE_AT[key] == value):
            continue
        if key not in known:
            raise CheckpointError(
                f"{file.path}: its metadata says {name}={shown(value)}, which is not read yet; load the model that it was made of"
            )
        found[key] = _reader(file, key)(name)
    return found


def _reader(file: GGUF, key: str) -> Callable[[str], Any]:
    if key.endswith(_FRACTIONS):
        return lambda name: float(file.said(name, float))
    if key in _FLAGS or key in _TEXTS:
        return lambda name: file.said(name, bool if key in _FLAGS else str)
    return file.count
