"""Cases of lesson 8. Products are torch's; tiles are counted as they are decoded; the bytes of a weight are those of ``quantize``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.shown import difference
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import empty_quantized

__all__ = ["EXERCISES"]


class _Tiles:
    """Decodes rows of a weight, and keeps which."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.asked: list[tuple[int, int]] = []

    def __call__(self, first: int, end: int) -> Tensor:
        self.asked.append((first, end))
        return self.weight[first:end].clone()


def _tiled_linear() -> Iterator[Case]:
    for seed, (tokens, in_features, out_features, tile) in enumerate(
        [(1, 2, 4, 2), (2, 3, 5, 2), (3, 4, 3, 8), (5, 16, 33, 16)]
    ):
        x, W = drawn(seed, (tokens, in_features), (out_features, in_features))
        said = f"x={list(x.shape)}, decode gives rows of W {list(W.shape)}, out_features={out_features}, tile={tile}"
        yield Case((x, _Tiles(W), out_features, tile), law=_each_row_once, said=said)


def _each_row_once(got: Any, x: Tensor, decode: _Tiles, out_features: int, tile: int) -> str | None:
    for first, end in decode.asked:
        if not 0 <= first < end <= out_features:
            return f"decode({first}, {end}) asks for rows that are not there; wanted rows from 0 to {out_features}"
        if end - first > tile:
            return f"decode({first}, {end}) is {end - first} rows, wanted at most {tile}"
    rows = sorted(row for first, end in decode.asked for row in range(first, end))
    if rows != list(range(out_features)):
        twice = next((row for row in range(out_features) if rows.count(row) != 1), 0)
        return f"row {twice} of W is decoded {rows.count(twice)} times, wanted once"
    return difference(got, x @ decode.weight.T, 1e-5)


def _bytes_moved() -> Iterator[Case]:
    yield Case((1, 2, 3, 8, 4), 2.0 * 3 + 2 * 4 + 3 * 4)
    for tokens, in_features, out_features, itemsize in [(1, 64, 128, 2), (32, 256, 64, 4)]:
        packed = empty_quantized((out_features, in_features), QuantConfig(), torch.float32)
        numbers = tokens * in_features + tokens * out_features
        arguments = (tokens, in_features, out_features, packed.bits_per_weight, itemsize)
        yield Case(arguments, float(packed.nbytes + numbers * itemsize), close=1e-12)


def _least_seconds() -> Iterator[Case]:
    for flops, moved, speed, width, wanted in [
        (10.0, 1.0, 5.0, 1.0, 2.0), (1.0, 10.0, 5.0, 5.0, 2.0), (6.0, 6.0, 3.0, 2.0, 3.0), (8e12, 4e9, 1e15, 2e12, 8e-3)
    ]:  # fmt: skip
        yield Case((flops, moved, speed, width), wanted, close=1e-12)


def _turning_point() -> Iterator[Case]:
    """There the roofline's two times are alike."""
    for bits, speed, width in [(16, 100.0, 10.0), (4, 100.0, 10.0), (4.5, 1e15, 3.35e12)]:
        yield Case((bits, speed, width), law=_both_alike)


def _both_alike(got: Any, bits: float, speed: float, width: float) -> str | None:
    if found := difference(got, float("nan")) if isinstance(got, bool) or not isinstance(got, (int, float)) else None:
        return found
    moving, computing = bits / 8 / width, 2 * got / speed
    return (
        None
        if abs(moving - computing) <= 1e-9 * moving
        else f"got {got:.7g}; with so many, a weight takes {moving:.3g} s to move and {computing:.3g} s to use, wanted the same"
    )


EXERCISES = (
    Exercise("tiled_linear", _tiled_linear),
    Exercise("bytes_moved", _bytes_moved),
    Exercise("least_seconds", _least_seconds),
    Exercise("turning_point", _turning_point),
)
