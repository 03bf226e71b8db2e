"""Activations in the CPU's memory: what a GPU would keep for the backward pass goes there, and comes back when it is needed.

With gradient checkpointing that is one tensor a block, the block's input, so that what a step holds on the GPU no longer grows with the
number of blocks, for one copy each way. (Without it every saved tensor would travel, which takes longer than to compute it again.)
Next file: ``training/step.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError

__all__ = ["offloaded", "refuse_offload"]

_LEAST = 1 << 16  # bytes: what is smaller stays


def refuse_offload(device: torch.device) -> None:
    """Raise ``ConfigError`` where a model on this device is in the CPU's memory already."""
    if not _is_away(device):
        raise ConfigError(
            f"offload='activations': the model is on {device}, whose memory they would go to; wanted a GPU, or offload='none'"
        )


def offloaded(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """A context for the forward pass: what autograd saves on a GPU goes to pinned memory of the CPU, weights apart."""
    if not wanted:
        return nullcontext()
    kept = {tensor.untyped_storage().data_ptr() for part in (model.parameters(), model.buffers()) for tensor in part}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        device = tensor.device
        if not _is_away(device) or tensor.nbytes < _LEAST or tensor.untyped_storage().data_ptr() in kept:
            return device, tensor
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        return device, here.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_away(device: torch.device) -> bool:
    return device.type == "cuda"
