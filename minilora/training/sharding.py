"""What is frozen in parts, what trains whole: FSDP2 over the blocks of a model, so that each process keeps a share of their weights.

A block's weights are gathered before it is computed and let go after. The adapters are no part of it: every process has them whole, so a
checkpoint is the same file with and without shards. Neither are the embedding, the last norm and the head: FSDP2 would keep them gathered
during a whole step. Next file: ``training/rows.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from minilora.errors import StateError
from minilora.linear.experts.hook import open_experts
from minilora.lora.change import Change
from minilora.lora.slots import adapters_in
from minilora.training.processes import Processes

__all__ = ["blocks_of", "in_turn", "refuse_skipping", "shard_blocks"]


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


def refuse_skipping(model: nn.Module) -> None:
    """Raise ``StateError`` for a model that leaves blocks out at random (LayerDrop).

    Each process would leave out other ones. But a block is gathered by all at once, and who gathers another one of the same shapes gets
    rows of both, without an error.
    """
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            found = {
                name: value for name, value in getattr(owner, "__dict__", {}).items() if name.endswith("layerdrop")
            }
            if dropped := next(((name, value) for name, value in found.items() if value), None):
                raise StateError(
                    f"{type(model).__name__} leaves blocks out at random ({dropped[0]}={dropped[1]}), and processes that share blocks must "
                    "call the same ones; set it to 0 in config.json, or leave --shard out (shard=False)"
                )


def shard_blocks(model: nn.Module, processes: Processes) -> None:
    """Keep only this process's rows of the frozen weights of each block; what trains, and all of an adapter, stays whole. In place, once.

    Raises:
        StateError: the model has no blocks, or leaves some out at random.
    """
    from torch.distributed.fsdp import fully_shard

    refuse_skipping(model)
    blocks = blocks_of(model)
    if any(_is_sharded(block) for block in blocks):  # while it was loaded
        return
    with Change() as change:
        for block in blocks:
            open_experts(change, block)
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    whole |= {
        p for adapter in adapters_in(model) for p in adapter._parameters.values() if p is not None
    }  # a frozen A too
    device = next(parameter for parameter in model.parameters() if not parameter.is_meta).device
    mesh = torch.distributed.init_device_mesh(device.type, (processes.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


@contextmanager
def in_turn(model: nn.Module) -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """``around(path)``: a context in which the block that the path lies in has all of its weights; in all processes at once.

    The block stays so until a path of another one comes. So a walk along the model gathers each block once, and memory holds one.
    """
    held: Any = None

    def turn_to(block: Any) -> None:
        nonlocal held
        if block is held:
            return
        if held is not None:
            held.reshard()
        held = block
        if block is not None:
            block.unshard()

    @contextmanager
    def around(path: str) -> Iterator[None]:
        turn_to(_block_at(model, path))
        yield

    try:
        yield around
    finally:
        turn_to(None)


def _block_at(model: nn.Module, path: str) -> Any:
    """The block in shards that a path lies in; None where there is none."""
    module: Any = model
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None or _is_sharded(module):
            return module
    return None


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")
