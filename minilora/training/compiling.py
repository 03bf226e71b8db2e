"""Compiled steps: torch writes kernels of its own for the blocks of a model, which all blocks of one kind share.

Only the steps are compiled. Whatever looks at a model from outside (evaluation, answers, the search for what is not finite) runs it as
it is written: hooks that come later would not be seen by compiled blocks. Dropout takes its numbers from torch's generator, so the same
seed means the same run, though not the run that is not compiled. Next file: ``training/loop.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minilora.errors import StateError
from minilora.training.sharding import blocks_of

__all__ = ["as_written", "compiled", "refuse_without_compiler"]


def refuse_without_compiler(model: nn.Module) -> None:
    """Raise ``StateError`` where torch cannot compile for the model's device (a compiler may be missing), or it has no blocks."""
    blocks_of(model)
    device = next(model.parameters()).device
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:  # of torch's compiler anything can come
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise StateError(
            f"compile=True: torch cannot compile for {device} here ({reason}); leave --compile out (compile=False)"
        ) from None


@contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model with its blocks compiled, as long as the context lasts; each when it is first called, which takes a minute or so."""
    if not wanted:
        yield
        return
    from torch._inductor import config

    blocks = blocks_of(model)
    with config.patch(fallback_random=True), warnings.catch_warnings():
        # torch's compiler looks at .grad of what goes into a block, and then warns of its own look
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        for block in blocks:
            block.compile()
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, compiled blocks run as they are written."""
    taken: list[tuple[Any, Any]] = [
        (part, part._compiled_call_impl) for part in model.modules() if part._compiled_call_impl
    ]
    for part, _ in taken:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in taken:
            part._compiled_call_impl = call
