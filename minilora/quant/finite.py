"""Whether a tensor holds NaN or infinity: the one test that stands before a weight is packed, saved, merged or exported.

It stands in ``quant/``, the lowest room that reads the values of weights, so that every room above may ask. The smallest and the largest
value are finite exactly when all are, and NaN comes out as both; finding them reads the tensor once and makes nothing of its size, where
``torch.isfinite(x).all()`` makes a magnitude and a mask, and a sum in float64 a copy of 8 bytes a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["is_finite"]

_CHUNK = 1 << 18  # values of a tensor that cannot be read as it lies, copied at a time
_REDUCED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # float8 has no reductions


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, for any shape, dtype and strides. Integers are finite, and so is what holds no value: an empty
    tensor, one on "meta".
    """
    values = tensor.detach()
    if not (values.is_floating_point() or values.is_complex()) or values.is_meta or not values.numel():
        return True
    if type(values) is not Tensor:  # a DTensor: a reduction over ranks need not keep NaN
        return bool(torch.isfinite(values).all())
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))  # as it lies in memory
    if values.dtype in _REDUCED and values.is_contiguous():
        return _between(values)
    return all(_between(part if part.dtype in _REDUCED else part.float()) for part in _parts(values))


def _between(values: Tensor) -> bool:
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _parts(values: Tensor) -> Iterator[Tensor]:
    """Views of at most ``_CHUNK`` values."""
    if values.numel() <= _CHUNK:
        yield values
        return
    for part in values.split(max(1, _CHUNK // values[0].numel())):
        yield from _parts(part if len(part) > 1 else part[0])
