"""Cases of lesson 9. What is wanted is what ``merge`` puts into a model, and what its report says is left of the update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilora.learn.case import Case, Exercise, drawn
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.many.merging import MergeReport, merge

__all__ = ["EXERCISES"]

_STEP = 2.0**-7  # of the largest value: what one rounding to bf16 may decide otherwise


def _merged_by_us(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, MergeReport]:
    """The weight that ``merge`` leaves, and its report."""
    with torch.random.fork_rng(devices=[]):
        model: Any = nn.ModuleDict({"q": nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)})
        model["q"].weight.data.copy_(W)
        inject(model, LoraConfig(r=len(A), lora_alpha=scaling * len(A), target_modules=["q"]))
    with torch.no_grad():
        model["q"].lora_A.copy_(A)
        model["q"].lora_B.copy_(B)
    report = merge(model)
    return model["q"].weight.detach(), report


def _merged() -> Iterator[Case]:
    one = torch.ones(1, 1)
    for size, a, dtype in [(1.0, 0.5, torch.float32), (256.0, 1.001, torch.bfloat16), (1.0, 0.001, torch.bfloat16),
                        (2048.0, 1.001, torch.float16)]:  # fmt: skip
        arguments = (torch.full((1, 1), size, dtype=dtype), torch.full((1, 1), a), one, 1.0)
        yield Case(arguments, _merged_by_us(*arguments)[0], close=0)
    arguments = (torch.zeros(2, 1), torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0]]), 3.0)
    yield Case(arguments, _merged_by_us(*arguments)[0])
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        W, A, B = drawn(seed, (6, 9), (2, 9), (6, 2))
        arguments = (W.to(dtype), A, B, 0.5)
        close = 1e-5 if dtype == torch.float32 else _STEP
        yield Case(arguments, _merged_by_us(*arguments)[0], close=close)


def _eaten() -> Iterator[Case]:
    W = torch.tensor([[1.0, 1.0, 256.0, 0.0]], dtype=torch.bfloat16)
    for delta, wanted in [
        ([0.001, 0.5, 0.5, 0.001], 0.5), ([0.0, 0.001, 0.5, 0.0], 1.0), ([0.0, 0.0, 0.0, 0.0], 0.0), ([0.1, 0.0, 0.9, 1.0], 1 / 3)
    ]:  # fmt: skip
        yield Case((W, torch.tensor([delta])), wanted)
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        weight, change = drawn(seed, (40, 30), (40, 30))
        small = (change * 1e-3) * (change > 0)
        W = weight.to(dtype)
        same, count = 0, 0
        for old, new, moved in zip(W.flatten(), (W.float() + small).to(dtype).flatten(), small.flatten(), strict=True):
            count += bool(moved)
            same += bool(moved) and bool(old == new)
        yield Case((W, small), same / count)


def _lost() -> Iterator[Case]:
    before = torch.tensor([[1.0, 2.0]])
    for after, delta, wanted in [
        ([1.5, 2.0], [0.5, 0.0], 0.0),
        ([1.0, 2.0], [0.5, 0.5], 1.0),
        ([2.0, 2.0], [0.5, 0.0], 1.0),
    ]:
        yield Case((before, torch.tensor([after]), torch.tensor([delta])), wanted)
    for seed, dtype in enumerate((torch.bfloat16, torch.float16)):
        W, A, B = drawn(seed, (8, 12), (2, 12), (8, 2))
        W, B = W.to(dtype), B * 1e-3
        stored, report = _merged_by_us(W, A, B, 2.0)
        yield Case((W, stored, 2.0 * (B @ A)), 1 - report.survived, close=1e-4)


EXERCISES = (Exercise("merged", _merged), Exercise("eaten", _eaten), Exercise("lost", _lost))
