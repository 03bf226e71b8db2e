"""How fast does minilora pack, unpack and multiply by four-bit weights, beside bitsandbytes? Run by ``cpu.py``.

Codes and values are compared bit by bit before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from comparison import Row, Setting, interleave
from torch import nn

from minilora import QuantConfig, QuantLinear
from minilora.quant.blockwise import quantize


def rows_quantize(setting: Setting) -> Iterator[Row]:
    import bitsandbytes.functional as bnb

    weight = torch.randn(*([576, 576] if setting.quick else [4096, 4096])) * 0.02
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(weight)
    if not (torch.equal(ours.packed.flatten(), theirs.flatten()) and torch.equal(ours.absmax, state.absmax)):
        raise RuntimeError("the codes differ from bitsandbytes'")
    calls = {
        "ours": lambda: quantize(weight),
        "peer": lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
    }
    yield Row("NF4 quantize, codes identical", ">= 5", "time", interleave(calls, setting.rounds), _shape(weight))


def rows_dequantize(setting: Setting) -> Iterator[Row]:
    import bitsandbytes.functional as bnb

    for shape, goal in (((4096, 4096), ">= 3"), ((11008, 4096), ">= 3"), ((576, 576), ">= 0.91")):
        if setting.quick and shape != (576, 576):
            continue
        weight = torch.randn(shape) * 0.02
        theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        packed, room = quantize(weight), torch.empty(shape)
        if not torch.equal(packed.dequantize(), bnb.dequantize_4bit(theirs, state)):
            raise RuntimeError("the values differ from bitsandbytes'")
        calls: dict[str, Callable[[], Any]] = {"ours": lambda p=packed, r=room: p.dequantize(out=r)}
        calls["peer"] = lambda t=theirs, s=state: bnb.dequantize_4bit(t, s)
        yield Row("dequantize, bit-exact, into a kept buffer", goal, "time", interleave(calls, setting.rounds), _shape(weight))  # fmt: skip


def rows_linear(setting: Setting) -> Iterator[Row]:
    import bitsandbytes as bnb

    size = 576 if setting.quick else 4096
    dense = nn.Linear(size, size, bias=False)
    ours = QuantLinear.from_linear(dense, QuantConfig("nf4"))
    theirs = bnb.nn.Linear4bit(
        size, size, bias=False, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32
    )
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    theirs = theirs.to("cpu")
    for count in (1, 16):
        x = torch.randn(count, size)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-3)
            samples = interleave({"ours": lambda x=x: ours(x), "peer": lambda x=x: theirs(x)}, setting.rounds)
        yield Row(f"quantized linear, M = {count}", ">= 2.5", "time", samples, f"{size}x{size}, fp32")


def _shape(weight: torch.Tensor) -> str:
    return "x".join(map(str, weight.shape))
