"""Writing a GGUF file with the ``gguf`` package's writer, tensor by tensor: what is written is never in memory whole.

Next file: ``gguf/rewrite.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.gguf.kinds import import_gguf

__all__ = ["Planned", "fill_gguf", "write_gguf"]

# Name, shape as torch has it, the type's name, and what makes the tensor when its turn comes: numbers of F32 and F16, else bytes of rows.
Planned = tuple[str, tuple[int, ...], str, Callable[[], Tensor]]


def write_gguf(architecture: str, describe: Callable[[Any], None], tensors: Mapping[str, Tensor]) -> bytes:
    """A small file in memory, its tensors in fp32 or fp16; ``describe`` puts the metadata into a ``gguf.GGUFWriter``."""
    kinds = {torch.float32: "F32", torch.float16: "F16"}
    planned = [
        (name, tuple(tensor.shape), kinds[tensor.dtype], (lambda tensor=tensor: tensor))
        for name, tensor in tensors.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.gguf"
        fill_gguf(path, architecture, describe, planned)
        return path.read_bytes()


def fill_gguf(path: Path, architecture: str, describe: Callable[[Any], None], planned: Iterable[Planned]) -> None:
    """Write ``path``: the table of all tensors first, then each as it is made."""
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    planned = list(planned)
    for name, shape, kind, _ in planned:
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        nbytes = int(np.prod(shape)) // block * size
        raw = (*shape[:-1], shape[-1] // block * size)
        dtype, told = (np.dtype(np.uint8), raw) if kind not in ("F32", "F16") else (_numpy(kind), shape)
        writer.add_tensor_info(name, told, dtype, nbytes, raw_dtype=number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, _, make in planned:
            writer.write_tensor_data(make().detach().contiguous().cpu().numpy())
    finally:
        writer.close()


def _numpy(kind: str) -> Any:
    return np.dtype(np.float32 if kind == "F32" else np.float16)
