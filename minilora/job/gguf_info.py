"""What a GGUF file says of itself, as ``minilora info`` shows it."""

from __future__ import annotations

import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import MiniLoraError
from minilora.gguf.file import open_gguf
from minilora.hf.gguf_model import held
from minilora.hf.gguf_tokenizer import gguf_tokenizer
from minilora.quant.gguf.formats import FORMATS

__all__ = ["about_gguf"]


def about_gguf(path: Path) -> dict[str, Any]:
    """What a GGUF file says of itself; whether it can be read as a model is what reading its config and its tokenizer says."""
    with open_gguf(path) as file:
        name, cut = file.metadata.get("general.name"), file.metadata.get("tokenizer.ggml.pre")
        kinds = dict(sorted(Counter(info.kind.name for info in file.tensors.values()).items()))
        packed = [info for info in file.tensors.values() if info.kind.name in FORMATS and len(info.shape) == 2]
        packed = [info for info in packed if info.name != "token_embd.weight"]
        rest = [info for info in file.tensors.values() if info not in packed]
        found: dict[str, Any] = {
            "kind": "GGUF model",
            "folder": str(path),
            "architecture": file.architecture,
            "name": name if isinstance(name, str) else None,
            "size": path.stat().st_size,
            "dtypes": kinds,
            "format": ", ".join(sorted({info.kind.name for info in packed})),
            "packed_layers": len(packed),
            "dense_parameters": sum(math.prod(info.shape) for info in rest),
            "pre_tokenizer": cut if isinstance(cut, str) else None,
        }
    why = _why_not(path)
    found["servers"] = [
        {"name": "minilora", "takes": "no" if why else "as it is", "why": why or f"--model {path}"},
        {"name": "llama.cpp", "takes": "as it is", "why": f"llama-server -m {path}"},
    ]
    return found


def _why_not(path: Path) -> str:
    """Why a GGUF file cannot be read as a model here, in words; "" if it can, or if nobody can tell without transformers."""
    if find_spec("transformers") is None:
        return ""
    try:
        held(path)
        gguf_tokenizer(path)
    except MiniLoraError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""
