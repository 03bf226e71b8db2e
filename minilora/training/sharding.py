"""What is frozen in parts, what trains whole: FSDP2 over the blocks of a model, so that each process keeps a share of their weights.

A block's weights are gathered before it is computed and let go after. The adapters are no part of it: every process has them whole, so a
checkpoint is the same file with and without shards. Neither are the embedding, the last norm and the head: FSDP2 would keep them gathered
during a whole step. Next file: ``training/loop.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minilora.errors import StateError
from minilora.training.processes import Processes

__all__ = ["blocks_of", "gathered", "shard_blocks"]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the longest ``ModuleList`` that is not inside another.

    Raises:
        StateError: it has none.
    """
    lists: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            lists.append(list(module))
            inside |= {id(part) for part in module.modules() if part is not module}
    if not any(lists):
        raise StateError(f"{type(model).__name__} has no list of blocks to shard; leave --shard out (shard=False)")
    return max(lists, key=len)


def shard_blocks(model: nn.Module, processes: Processes) -> None:
    """Keep only this process's rows of the frozen weights of each block; what trains stays whole. In place.

    Raises:
        StateError: the model has no blocks.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = blocks_of(model)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = torch.distributed.init_device_mesh(next(model.parameters()).device.type, (processes.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


@contextmanager
def gathered(model: nn.Module, path: str) -> Iterator[None]:
    """The block that a path lies in with all of its weights, as long as the context lasts; in all processes at once."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts))]
    block: Any = next((module for module in around if hasattr(module, "unshard")), None)
    if block is not None:
        block.unshard()
    try:
        yield
    finally:
        if block is not None:
            block.reshard()
