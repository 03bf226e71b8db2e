"""Cases of lesson 5. What is wanted are the scales, codes, bytes and weights of ``quantize``, and its reference twins."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minilora.learn.case import Case, Exercise, drawn
from minilora.quant.blockwise import quantize
from minilora.quant.codebooks import NF4
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import nearest_code_reference, pack

__all__ = ["EXERCISES"]

_SHAPES = [((1, 64), 64), ((3, 50), 32), ((5, 77), 64), ((2, 3), 32)]


def _absmax() -> Iterator[Case]:
    yield Case((torch.tensor([1.0, -3.0, 2.0, 0.5]), 2), torch.tensor([3.0, 2.0]), close=0)
    yield Case((torch.tensor([1.0, 2.0, -5.0]), 2), torch.tensor([2.0, 5.0]), close=0)
    yield Case((torch.tensor([[1.0, -7.0, 2.0], [3.0, 4.0, 5.0]]), 2), torch.tensor([7.0, 3.0, 5.0]), close=0)
    for seed, (shape, size) in enumerate(_SHAPES):
        (weight,) = drawn(seed, shape)
        yield Case((weight, size), quantize(weight, QuantConfig(blocksize=size)).absmax, close=0)


def _codes() -> Iterator[Case]:
    levels = NF4.table()
    middles = NF4.thresholds()[0]
    for values in (torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.4]), torch.tensor([-0.3, 0.26])):
        yield _coded(values, f"values={[round(v, 2) for v in values.tolist()]}, levels=those of NF4")
    yield _coded(middles[9:10], "values=[the middle between levels 9 and 10 of NF4], levels=those of NF4")
    yield _coded(middles, "values=the middles between the levels of NF4, levels=those of NF4")
    yield _coded(torch.linspace(-1, 1, 5001), "values=5001 even steps from -1 to 1, levels=those of NF4")
    even = torch.linspace(-1, 1, 16)
    yield Case((torch.tensor([0.95, 0.01]), even), torch.tensor([15, 8], dtype=torch.uint8))
    yield Case((levels.clone(), levels), torch.arange(16, dtype=torch.uint8))


def _coded(values: torch.Tensor, said: str) -> Case:
    return Case((values, NF4.table().clone()), nearest_code_reference(values, NF4), said=said)


def _pack() -> Iterator[Case]:
    for codes in ([1, 2], [15, 0, 3, 4], [9], [1, 2, 3]):
        yield Case((torch.tensor(codes, dtype=torch.uint8),), pack(torch.tensor(codes, dtype=torch.uint8), 4))
    many = torch.randint(16, (1001,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    yield Case((many,), pack(many, 4))


def _decode() -> Iterator[Case]:
    tens = torch.arange(16, dtype=torch.float32)
    byte = torch.tensor([0x12, 0x34], dtype=torch.uint8)
    said = "packed=[0x12, 0x34], absmax={}, levels=0 to 15, blocksize=2, count={}"
    for absmax, count in (([1.0, 1.0], 4), ([1.0, 10.0], 4), ([1.0, 10.0], 3)):
        wanted = torch.tensor([1.0, 2.0, 3.0 * absmax[1], 4.0 * absmax[1]])[:count]
        yield Case((byte, torch.tensor(absmax), tens, 2, count), wanted, close=0, said=said.format(absmax, count))
    for seed, (shape, size) in enumerate(_SHAPES):
        (weight,) = drawn(seed, shape)
        q = quantize(weight, QuantConfig(blocksize=size))
        arguments = (q.packed.flatten(), q.absmax, NF4.table().clone(), size, weight.numel())
        yield Case(arguments, q.dequantize().flatten(), close=1e-6)


EXERCISES = (
    Exercise("absmax", _absmax),
    Exercise("codes", _codes),
    Exercise("pack", _pack),
    Exercise("decode", _decode),
)
