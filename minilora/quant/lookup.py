"""The two hot loops of quantization on a CPU: value to code, and packed code to value.

Each has a slow twin of one line that defines it (``nearest_code_reference``, ``decode_reference``); tests hold them equal to the bit.
Both loops write into buffers that are reused from call to call, because touching fresh memory costs more than the work itself
(fresh pages of a 64 MB output take several times as long as decoding into a warm buffer). Buffers belong to their thread.
Next file: ``linear/layers.py``.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from minilora.quant.codebooks import Codebook
from minilora.quant.constants import constant

_GRID = 256  # cells over [-1, 1]; fine enough that each holds at most one threshold of every table here
_local = threading.local()


def scratch(name: str, count: int, dtype: torch.dtype) -> Tensor:
    """A flat buffer of ``count`` elements that the next call with the same name on this thread will reuse."""
    held: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    if (buffer := held.get((name, dtype))) is None or buffer.numel() < count:
        with torch.inference_mode(False):  # a buffer made under inference mode could not be written outside of it
            buffer = held[name, dtype] = torch.empty(count, dtype=dtype, device="cpu")
    return buffer[:count]


def release_scratch() -> None:
    """Free this thread's buffers (they are at most a few MB each)."""
    _local.__dict__.pop("buffers", None)


def nearest_code_reference(scaled: Tensor, book: Codebook) -> Tensor:
    """Code of the nearest level of each value in [-1, 1]; a tie goes to the lower level. uint8, shape of ``scaled``."""
    midpoints, codes = book.thresholds()
    place = scaled.device
    return codes.to(place, torch.uint8)[torch.bucketize(scaled, midpoints.to(place))]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to a stream of bits, the first code in the highest bits: uint8 ``[n]`` to uint8 ``[ceil(n * bits / 8)]``.

    With 4 bits the first of two weights lies in the high nibble, as in bitsandbytes.
    """
    count, group = codes.numel(), math.lcm(bits, 8) // bits
    padded = torch.nn.functional.pad(codes, (0, -count % group)).view(-1, group).long()
    shifts = torch.arange(group - 1, -1, -1, device=codes.device) * bits
    words = (padded << shifts).sum(1, keepdim=True)
    octets = torch.arange(group * bits // 8 - 1, -1, -1, device=codes.device) * 8
    return ((words >> octets) & 255).to(torch.uint8).flatten()[: -(-count * bits // 8)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack``: the first ``count`` codes, uint8."""
    group = math.lcm(bits, 8) // bits
    width = group * bits // 8
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % width)).view(-1, width).long()
    octets = torch.arange(width - 1, -1, -1, device=packed.device) * 8
    words = (padded << octets).sum(1, keepdim=True)
    shifts = torch.arange(group - 1, -1, -1, device=packed.device) * bits
    return ((words >> shifts) & (2**bits - 1)).to(torch.uint8).flatten()[:count]


def decode_reference(packed: Tensor, book: Codebook, count: int) -> Tensor:
    """Levels of ``count`` packed codes: uint8 ``[ceil(count * bits / 8)]`` to fp32 ``[count]``."""
    return book.table(packed.device)[unpack(packed, book.bits, count).long()]


@constant
def _grid(book: Codebook) -> Tensor | None:
    """For each grid cell (code below its threshold, the threshold) packed in one int64; None if two thresholds share a cell."""
    midpoints, codes = book.thresholds()
    cells = (midpoints * (_GRID / 2) + _GRID / 2).to(torch.int32)
    if len(set(cells.tolist())) < len(cells) or not torch.equal(codes, torch.arange(len(codes))):
        return None
    below = torch.tensor([int((cells < cell).sum()) for cell in range(_GRID + 2)], dtype=torch.int32)
    limit = torch.full((_GRID + 2,), float("inf"), dtype=torch.float32)
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


@constant
def _bytes(book: Codebook) -> Tensor:
    """All fp32 levels of every byte as one wide element (int64 for two, complex128 for four): one look-up decodes a whole byte."""
    byte, per = torch.arange(256, dtype=torch.uint8), 8 // book.bits
    levels = decode_reference(byte, book, 256 * per).view(256, per).contiguous()
    return levels.view(torch.int64 if per == 2 else torch.complex128).flatten() if per > 1 else levels.flatten()


def decode_into(packed: Tensor, book: Codebook, out: Tensor) -> None:
    """``decode_reference`` of uint8 ``[ceil(n * bits / 8)]`` into fp32 ``out [n]`` (contiguous, CPU)."""
    if book.bits == 3:  # eight codes lie in three bytes: unpacked first
        codes = unpack(packed, 3, out.numel()).int()
        torch.index_select(book.table(), 0, codes, out=out)
        return
    table, per = _bytes(book), 8 // book.bits
    whole = out.numel() // per
    index = scratch("byte", whole, torch.int32).copy_(packed[:whole])
    torch.index_select(table, 0, index, out=out[: whole * per].view(table.dtype))
    if rest := out.numel() - whole * per:  # the last byte holds fewer weights
        out[-rest:] = decode_reference(packed[whole : whole + 1], book, rest)
