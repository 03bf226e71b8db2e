"""Convolutions as linear layers over patches: ``y[out] = W [out, in] . patch [in]``, with ``in = in_channels * kernel positions``.

A convolution of several groups is one whose ``W`` is zero where an output channel does not see an input channel. So everything that is
said of ``[out, in]`` (updates, merging, norms of rows) holds for convolutions too, and nobody else needs to know about kernels.
Next file: ``linear/layers.py``.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "block_diagonal",
    "convolve",
    "convolve_rows",
    "is_convolution",
    "of_channels",
    "patch_weight",
    "put_patch_weight",
]

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight


def is_convolution(layer: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether this is a ``Conv1d``, ``Conv2d`` or ``Conv3d``; a transposed one is not."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def patch_weight(layer: _ConvNd) -> Tensor:
    """The weight as ``[out, in]``, detached; shares memory with the layer unless it has groups."""
    return block_diagonal(layer.weight.detach().flatten(2), layer.groups).flatten(1)


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """``[out, in / groups, ...]`` of a grouped product to ``[out, in, ...]`` of the same without groups."""
    if groups == 1:
        return weight
    out, width = weight.shape[:2]
    whole = weight.new_zeros(groups, out // groups, groups, width, *weight.shape[2:])
    each = torch.arange(groups, device=weight.device)
    whole[each, :, each] = weight.reshape(groups, out // groups, width, *weight.shape[2:])
    return whole.reshape(out, groups * width, *weight.shape[2:])


def put_patch_weight(layer: _ConvNd, weight: Tensor) -> Tensor:
    """``[out, in]`` to ``[out, in_channels, *kernel]``: the weight of such a layer, without groups."""
    return weight.reshape(len(weight), layer.in_channels, *layer.kernel_size)


def convolve(layer: _ConvNd, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """``weight`` over ``x`` with the stride, dilation and padding of ``layer``; without a bias.

    Args:
        x: ``[batch, channels, ...]``, or without the batch. weight: ``[out, channels / groups, *kernel]``.
    """
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return _CONVOLVE[weight.dim()](x, weight, None, layer.stride, padding, layer.dilation, groups)


def convolve_rows(layer: _ConvNd, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Another low-rank update for every row: ``A [batch, r, in]`` over ``x [batch, channels, ...]``, then ``B [batch, out, r]``.

    The rows are taken as the groups of one convolution. Returns ``[batch, out, positions]``.
    """
    batch, r, _ = A.shape
    kernels = A.reshape(batch * r, layer.in_channels, *layer.kernel_size)
    thin = convolve(layer, x.reshape(1, -1, *x.shape[2:]), kernels, groups=batch)
    return torch.bmm(B, thin.reshape(batch, r, -1))


def of_channels(layer: _ConvNd, values: Tensor) -> Tensor:
    """``[channels]`` shaped so that it is broadcast over the positions of the layer's output."""
    return values.reshape(-1, *[1] * len(layer.kernel_size))
