"""Cases of lesson 10. What is wanted is what ``batch_adapters`` gives each row, and the law that every stack keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.shown import difference, kind_of
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.lora.slots import adapters_of
from minilora.many.batched import BASE, batch_adapters

__all__ = ["EXERCISES"]

Adapter = tuple[Tensor, Tensor, float]
_ONE: list[Adapter] = [(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [3.0]]), 2.0)]
_SAID = "{} adapters of ranks {} and scalings {}, in {}, out {}"


def _some(seed: int, ranks: Sequence[int], in_features: int, out_features: int) -> list[Adapter]:
    found = []
    for number, r in enumerate(ranks):
        A, B = drawn(100 * seed + number, (r, in_features), (out_features, r))
        found.append((A, B, (1.0, 0.5, 3.0)[number % 3]))
    return found


def _lists() -> Iterator[list[Adapter]]:
    yield _ONE
    yield _some(1, [2, 2], 4, 3)
    yield _some(2, [1, 3], 4, 3)
    yield _some(3, [4, 2, 3], 7, 5)


def _told(adapters: list[Adapter]) -> str:
    sizes = adapters[0][0].shape[1], adapters[0][1].shape[0]
    return _SAID.format(len(adapters), [len(A) for A, _, _ in adapters], [s for _, _, s in adapters], *sizes)


def _stacked() -> Iterator[Case]:
    for adapters in _lists():
        yield Case((adapters,), law=_each_in_its_place, said=_told(adapters))


def _each_in_its_place(got: Any, adapters: list[Adapter]) -> str | None:
    """Every place of the stacks has the update of its adapter, and the last has none."""
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got {kind_of(got)}; wanted a tuple (A, B)"
    A, B = got
    most, first = max(len(factor) for factor, _, _ in adapters), adapters[0]
    shapes = (len(adapters) + 1, most, first[0].shape[1]), (len(adapters) + 1, first[1].shape[0], most)
    for name, stack, shape in (("A", A, shapes[0]), ("B", B, shapes[1])):
        if found := difference(torch.zeros_like(stack), torch.zeros(shape)):
            return f"{name}: {found}"
    for place, (own_A, own_B, scaling) in enumerate(adapters):
        if found := difference(A[place, : len(own_A)], own_A, 1e-6):
            return f"A of adapter {place}: {found}"
        if found := difference(B[place] @ A[place], scaling * (own_B @ own_A), 1e-5):
            return f"B A of adapter {place}: {found}"
    found = difference(A[-1], torch.zeros(shapes[0][1:])) or difference(B[-1], torch.zeros(shapes[1][1:]))
    return f"last place, for rows without an adapter: {found}" if found else None


def _by_us(x: Tensor, W: Tensor, adapters: list[Adapter], pick: Tensor) -> Tensor:
    """What minilora's model gives these rows."""
    with torch.random.fork_rng(devices=[]):
        model: Any = nn.ModuleDict({"q": nn.Linear(W.shape[1], W.shape[0], bias=False)})
        for number, (A, _, scaling) in enumerate(adapters):
            inject(model, LoraConfig(r=len(A), lora_alpha=scaling * len(A), target_modules=["q"]), f"a{number}")
    slot: Any = adapters_of(model).slots["q"]
    with torch.no_grad():
        slot.base.weight.copy_(W)
        for number, (A, B, _) in enumerate(adapters):
            slot.kept[f"a{number}"].lora_A.copy_(A)
            slot.kept[f"a{number}"].lora_B.copy_(B)
        names = [f"a{number}" if number < len(adapters) else BASE for number in pick.tolist()]
        with batch_adapters(model.eval(), names):
            result: Tensor = model["q"](x)
    return result


def _mixed() -> Iterator[Case]:
    for seed, (adapters, picks, tokens) in enumerate(
        [
            (_ONE, [0], 1),
            (_ONE, [1, 0], 1),
            (_some(4, [2, 2], 4, 3), [1, 0, 2, 1], 3),
            (_some(5, [1, 3, 2], 6, 7), [3, 2, 2, 0, 1], 2),
        ]
    ):
        in_features, out_features, most = (
            adapters[0][0].shape[1],
            adapters[0][1].shape[0],
            max(len(A) for A, _, _ in adapters),
        )
        x, W = drawn(seed, (len(picks), tokens, in_features), (out_features, in_features))
        stack_A, stack_B = (
            torch.zeros(len(adapters) + 1, most, in_features),
            torch.zeros(len(adapters) + 1, out_features, most),
        )
        for place, (A, B, scaling) in enumerate(adapters):
            stack_A[place, : len(A)], stack_B[place, :, : len(A)] = A, scaling * B
        pick = torch.tensor(picks)
        yield Case((x, W, stack_A, stack_B, pick), _by_us(x, W, adapters, pick))


def _added() -> Iterator[Case]:
    for adapters, weights in zip(_lists(), ([2.0], [1.0, 1.0], [0.5, -2.0], [1.0, 0.25, -1.0]), strict=True):
        yield Case((adapters, weights), law=_sums, said=f"{_told(adapters)}, weights={weights}")


def _sums(got: Any, adapters: list[Adapter], weights: list[float]) -> str | None:
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got {kind_of(got)}; wanted a tuple (A, B)"
    A, B = got
    rank = sum(len(factor) for factor, _, _ in adapters)
    for name, factor, shape in (("A", A, (rank, adapters[0][0].shape[1])), ("B", B, (adapters[0][1].shape[0], rank))):
        if found := difference(torch.zeros_like(factor), torch.zeros(shape)):
            return f"{name}: {found}"
    updates = [weight * scaling * (b @ a) for weight, (a, b, scaling) in zip(weights, adapters, strict=True)]
    found = difference(B @ A, torch.stack(updates).sum(0), 1e-5)
    return f"B A: {found}" if found else None


EXERCISES = (Exercise("stacked", _stacked), Exercise("mixed", _mixed), Exercise("added", _added))
