"""What ``aot.py`` compiles: every launch that ships, recorded from the wrappers and compiled for a card that is not here.

The wrappers are called on tensors without memory while ``JITFunction.run`` is replaced by a recorder.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import minilora_kernels as mk
from minilora_kernels import launch
from minilora_kernels.partials import total

LEVELS = tuple(i / 7.5 - 1 for i in range(16))
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32"}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel, its arguments, its options."""

    label: str
    arch: str
    fn: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def weight(n: int = 4096, k: int = 4096, bits: int = 4, nested: bool = False) -> mk.Weight:
    """A weight without memory."""
    empty = functools.partial(torch.empty, device="meta")
    blocks, packed = n * k // 64, empty(n * k * bits // 8, dtype=torch.uint8)
    if not nested:
        return mk.Weight(packed, empty(blocks), LEVELS[: 1 << bits], (n, k))
    absmax = empty(blocks, dtype=torch.uint8)
    return mk.Weight(packed, absmax, LEVELS[: 1 << bits], (n, k), 64, empty(256), empty(blocks // 256), empty(1))


def calls(arch: str) -> dict[str, Any]:
    """Every shipped launch of an architecture, by name: each tile of the tables, with and without its options."""
    bf16, f16 = torch.bfloat16, torch.float16

    def of(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    plain, double = weight(), weight(nested=True)
    linear, dgrad = (functools.partial(call, path="fused") for call in (mk.nf4_linear, mk.nf4_dgrad))
    found: dict[str, Any] = {
        "dequant": lambda: mk.nf4_dequant(plain, bf16),
        "dequant nested": lambda: mk.nf4_dequant(double, bf16),
        "quantize": lambda: mk.nf4_quantize(of(4096, 4096), LEVELS),
        "quantize ragged": lambda: mk.nf4_quantize(of(3, 21), LEVELS),
        "lora_down r16": lambda: mk.lora_down(of(4096, 4096), of(16, 4096), 2.0),
        "lora_bwd_b r16": lambda: mk.lora_bwd_b(of(4096, 4096), of(4096, 16), of(4096, 16), 2.0),
        "lora_bwd_a r16": lambda: mk.lora_bwd_a(of(4096, 16), of(4096, 4096)),
        "linear M4096 2 bits": lambda: linear(of(4096, 4096), weight(bits=2)),
        "lora_down r64": lambda: mk.lora_down(of(4096, 4096), of(64, 4096), 2.0),
        "lora_bwd_b r64": lambda: mk.lora_bwd_b(of(4096, 4096), of(4096, 64), of(4096, 64), 2.0),
        "lora_bwd_a r64": lambda: mk.lora_bwd_a(of(4096, 64), of(4096, 4096)),
        "gemv M16 nested r64": lambda: mk.nf4_gemv(of(16, 4096), double, of(16, 64), of(4096, 64)),
        "gemv M1": lambda: mk.nf4_gemv(of(1, 4096), plain),
        "gemv M16 nested r16": lambda: mk.nf4_gemv(of(16, 4096), double, of(16, 16), of(4096, 16)),
        "gemv M32 nested r16": lambda: mk.nf4_gemv(of(32, 4096), double, of(32, 16), of(4096, 16)),
        "gemv M64 nested r16": lambda: mk.nf4_gemv(of(64, 4096), double, of(64, 16), of(4096, 16)),
    }
    for m in (64, 512, 4096):  # each takes another tile where there are three
        found[f"linear M{m}"] = lambda m=m: linear(of(m, 4096), plain)
        found[f"linear M{m} nested r16"] = lambda m=m: linear(of(m, 4096), double, of(m, 16), of(4096, 16))
        found[f"dgrad M{m}"] = lambda m=m: dgrad(of(m, 4096), plain)
        found[f"dgrad M{m} nested r16"] = lambda m=m: dgrad(of(m, 4096), double, of(m, 16), of(16, 4096))
    found["linear M4096 r64"] = lambda: linear(of(4096, 4096), plain, of(4096, 64), of(4096, 64))
    found["dgrad M4096 r64"] = lambda: dgrad(of(4096, 4096), plain, of(4096, 64), of(64, 4096))
    found["linear M4096 fp16 r16"] = lambda: linear(
        of(4096, 4096, dtype=f16), plain, of(4096, 16, dtype=f16), of(4096, 16)
    )
    found["linear M4096 bias"] = lambda: linear(of(4096, 4096), plain, bias=of(4096))
    found |= grouped_calls(of)
    found["total"] = lambda: total(of(8, 16, 4096, dtype=torch.float32), bf16)
    return found


def grouped_calls(of: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Those with eight experts, which have M rows each on average."""
    experts, found = 8, {}
    offs, f16 = of(experts, dtype=torch.int32), torch.float16
    plain, double, two = (weight(experts * 4096, **kind) for kind in ({}, {"nested": True}, {"bits": 2}))
    linear, dgrad = (
        functools.partial(call, experts=experts, offs=offs, path="fused")
        for call in (mk.grouped_linear, mk.grouped_dgrad)
    )

    def low(m: int, *shape: int) -> dict[str, torch.Tensor]:
        return {"h": of(m * experts, min(shape)), "B" if shape[0] > shape[1] else "A": of(experts, *shape)}

    for m in (8, 20, 64, 128, 4096):  # each takes another tile
        x = of(m * experts, 4096)
        found[f"grouped linear M{m} nested r16"] = lambda m=m, x=x: linear(x, double, **low(m, 4096, 16))
        found[f"grouped dgrad M{m} nested r16"] = lambda m=m, x=x: dgrad(x, double, **low(m, 16, 4096))
    found["grouped linear M4096"] = lambda: linear(x, plain)
    found["grouped dgrad M4096"] = lambda: dgrad(x, plain)
    found["grouped linear M4096 r64"] = lambda: linear(x, plain, **low(4096, 4096, 64))
    found["grouped dgrad M4096 r64"] = lambda: dgrad(x, plain, **low(4096, 64, 4096))
    found["grouped linear M4096 2 bits"] = lambda: linear(x, two)
    found["grouped dgrad M4096 2 bits"] = lambda: dgrad(x, two)
    found["grouped linear M4096 fp16"] = lambda: linear(x.to(f16), plain)
    return found


def record(arch: str, label: str, call: Any) -> list[Launch]:
    """The launches that ``call`` makes on ``arch``."""
    taken: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        taken.append(Launch(label, arch, self, named, options))

    kept_run, kept_arch = JITFunction.run, launch.arch_of
    JITFunction.run, launch.arch_of = run, lambda device: arch
    try:
        call()
    finally:
        JITFunction.run, launch.arch_of = kept_run, kept_arch
    if len(taken) > 1:  # the sum of parts stands under its own name, once
        taken = [one for one in taken if one.fn.__name__ != "total_kernel"]
    return taken


def described(one: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """``(signature, constants, attributes)``: arguments are specialised as the run time would."""
    constexprs = {p.name for p in one.fn.params if p.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for place, name in enumerate(one.fn.arg_names):
        value = one.arguments[name]
        if name in constexprs or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compiled(one: Launch) -> tuple[Any, str]:
    """``(triton's compiled kernel, what ptxas said)``."""
    target = GPUTarget("hip", one.arch, 64) if one.arch.startswith("gfx") else GPUTarget("cuda", int(one.arch[3:]), 32)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        kernel = triton.compile(ASTSource(one.fn, *described(one)), target=target, options=one.options)
    return kernel, said.getvalue()
