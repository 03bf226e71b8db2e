"""The model inside of what ``torch.compile``, DDP, ``DataParallel`` or FSDP made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from minilora.lora.slots import unwrapped

__all__ = ["gathered", "innermost"]

_HOLDS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def innermost(model: Any) -> Any:
    """The model that got the adapters."""
    while True:
        inner: Any = unwrapped(model)
        attribute = _HOLDS.get(type(inner).__name__)
        if attribute is not None and set(inner._modules) == {attribute}:
            inner = inner._modules[attribute]
        if inner is model:
            return model
        model = inner


@contextmanager
def gathered(model: nn.Module, write: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, a model that FSDP1 has sharded holds its whole parameters; what is read there goes through the function that this gives.

    ``write``: what is written into them is kept. All ranks must come here.
    """
    if type(unwrapped(model)).__name__ != "FullyShardedDataParallel":
        yield lambda tensor: tensor
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(unwrapped(model), writeback=write):
        yield lambda tensor: tensor.detach().clone()
