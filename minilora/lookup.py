"""The two hot loops of quantization on a CPU: value to code, and packed code to value.

Each has a slow twin of one line that defines it (``nearest_code_reference``, ``decode_reference``); tests hold them equal to the bit.
Both loops write into buffers that are reused from call to call, because touching fresh memory costs more than the work itself
(fresh pages of a 64 MB output take several times as long as decoding into a warm buffer). Buffers belong to their thread.
Next file: ``layers.py``.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from minilora.codebooks import Codebook

_GRID = 256  # cells over [-1, 1]; fine enough that each holds at most one threshold of every table here
_local = threading.local()


def scratch(name: str, count: int, dtype: torch.dtype) -> Tensor:
    """A flat buffer of ``count`` elements that the next call with the same name on this thread will reuse."""
    held: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    if (buffer := held.get((name, dtype))) is None or buffer.numel() < count:
        buffer = held[name, dtype] = torch.empty(count, dtype=dtype)
    return buffer[:count]


def release_scratch() -> None:
    """Free this thread's buffers (they are at most a few MB each)."""
    _local.__dict__.pop("buffers", None)


def nearest_code_reference(scaled: Tensor, book: Codebook) -> Tensor:
    """Code of the nearest level of each value in [-1, 1]; a tie goes to the lower level. uint8, shape of ``scaled``."""
    midpoints, codes = book.thresholds()
    return codes[torch.bucketize(scaled, midpoints.to(scaled.device)).cpu()].to(scaled.device, torch.uint8)


def decode_reference(packed: Tensor, book: Codebook) -> Tensor:
    """Levels of packed 4-bit codes, first value in the high nibble: uint8 ``[n]`` to fp32 ``[2 n]``."""
    return book.table(packed.device)[torch.stack([packed >> 4, packed & 15], -1).flatten().long()]


@functools.lru_cache(maxsize=16)
def _grid(book: Codebook) -> Tensor | None:
    """For each grid cell (code below its threshold, the threshold) packed in one int64; None if two thresholds share a cell."""
    midpoints, codes = book.thresholds()
    cells = (midpoints * (_GRID / 2) + _GRID / 2).to(torch.int32)
    if len(set(cells.tolist())) < len(cells) or not torch.equal(codes, torch.arange(len(codes))):
        return None
    below = torch.tensor([int((cells < cell).sum()) for cell in range(_GRID + 2)], dtype=torch.int32)
    limit = torch.full((_GRID + 2,), float("inf"))
    limit[cells.long()] = midpoints
    return torch.stack([below, limit.view(torch.int32)], 1).contiguous().view(torch.int64).flatten()


def nearest_code(scaled: Tensor, book: Codebook) -> Tensor:
    """``nearest_code_reference`` for fp32 values on any device; on a CPU by one look-up and one comparison per value.

    The result may be a reused buffer: use it before the next call.
    """
    table = _grid(book)
    if scaled.device.type != "cpu" or table is None:
        return nearest_code_reference(scaled, book)
    values, count = scaled.reshape(-1), scaled.numel()
    place = torch.mul(values, _GRID / 2, out=scratch("place", count, torch.float32)).add_(_GRID / 2)
    cell = scratch("cell", count, torch.int32).copy_(place)
    entry = torch.index_select(table, 0, cell, out=scratch("entry", count, torch.int64))
    above = torch.gt(values, entry.view(torch.float32)[1::2], out=scratch("above", count, torch.bool))
    code = scratch("code", count, torch.uint8).copy_(entry.view(torch.int32)[::2])
    return code.add_(above.view(torch.uint8)).view(scaled.shape)


@functools.lru_cache(maxsize=16)
def _pairs(book: Codebook) -> Tensor:
    """Both fp32 levels of every byte as one int64: one look-up decodes two weights."""
    byte = torch.arange(256)
    levels = book.table()
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).contiguous().view(torch.int64).flatten()


def decode_into(packed: Tensor, book: Codebook, out: Tensor) -> None:
    """``decode_reference`` of uint8 ``[ceil(n / 2)]`` into fp32 ``out [n]`` (contiguous, CPU)."""
    whole = out.numel() // 2
    index = scratch("byte", whole, torch.int32).copy_(packed[:whole])
    torch.index_select(_pairs(book), 0, index, out=out[: 2 * whole].view(torch.int64))
    if out.numel() % 2:  # the last byte of an odd count holds one weight
        out[-1] = book.table()[int(packed[whole]) >> 4]
