"""What is checked of the kernels on a GPU, stage by stage. Run by ``gpu.py``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import minilora_kernels as mk
from minilora_kernels.launch import arch_of, lookup_for
from minilora_kernels.weight import prescale

INTERPRET = "--interpret" in sys.argv
DEVICE = "cpu" if INTERPRET else "cuda"
HALF = torch.float32 if INTERPRET else torch.bfloat16  # the interpreter's bf16 arithmetic is wrong
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}  # relative to the norm of the result
Check = tuple[str, float, float]  # what, found, at most
Size = tuple[int, int, int]  # M, N, K


# --- material ---


def levels(bits: int = 4) -> tuple[float, ...]:
    """Quantiles of a normal distribution, like NF4's but of no format: the kernels take any table."""
    places = (torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits)
    values = torch.erfinv(2 * places - 1)
    return tuple((values / values.abs().max()).tolist())


def weight(
    n: int, k: int, bits: int = 4, nested: bool = True, blocksize: int = 64, seed: int | None = None
) -> mk.Weight:
    """A random packed weight on the device."""
    generator = torch.Generator().manual_seed(n + k if seed is None else seed)
    blocks = -(-n * k // blocksize)
    packed = torch.randint(0, 256, (-(-n * k * bits // 8),), dtype=torch.uint8, generator=generator).to(DEVICE)
    if not nested:
        absmax = (torch.rand(blocks, generator=generator) * 0.05 + 0.02).to(DEVICE)
        return mk.Weight(packed, absmax, levels(bits), (n, k), blocksize)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator).to(DEVICE)
    code2 = torch.linspace(-1, 1, 256).to(DEVICE)
    absmax2 = (torch.rand(-(-blocks // 256), generator=generator) * 0.01 + 0.01).to(DEVICE)
    return mk.Weight(
        packed, codes, levels(bits), (n, k), blocksize, code2, absmax2, torch.tensor([0.05], device=DEVICE)
    )


def draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype or HALF)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that what a kernel does not write shows."""
    real = torch.empty

    def empty(*args, **kwargs):  # type: ignore[no-untyped-def]
        made = real(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 85)

    torch.empty = empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = real


def error(got: Tensor, want: Tensor) -> float:
    """Relative to the norm; infinite if anything is NaN or the shape differs."""
    if got.shape != want.shape or bool(got.isnan().any()):
        return float("inf")
    return float((got.double() - want).norm() / want.norm())


def differing(got: Tensor, want: Tensor) -> float:
    """The share of elements that are not equal, NaN included."""
    return float((got.cpu() != want.cpu()).double().mean()) if got.shape == want.shape else 1.0


# --- the checks ---


def check_dequant() -> Iterator[Check]:
    sizes = [(256, 512, 4, True, 64), (33, 77, 4, True, 32), (130, 65, 2, False, 64), (300, 64, 4, True, 128)]
    for n, k, bits, nested, blocksize in sizes:
        w = weight(n, k, bits, nested, blocksize)
        parts = {name: part.cpu() if isinstance(part, Tensor) else part for name, part in vars(w).items()}
        on_cpu = type(w)(**parts)
        for dtype in (torch.float32, torch.float16) if INTERPRET else (torch.float32, torch.bfloat16, torch.float16):
            with poisoned():
                got = mk.nf4_dequant(w, dtype)
            yield (
                f"dequant {n}x{k} {bits} bits nested={nested} {dtype}: differing",
                differing(got, mk.dequant_reference(on_cpu, dtype)),
                0,
            )
    dense = torch.randn(130, 77).to(DEVICE)
    whole = torch.randn(96, 128)
    for bits in (4, 2):
        with poisoned():
            got, odd = mk.nf4_quantize(whole.to(DEVICE), levels(bits)), mk.nf4_quantize(dense, levels(bits))
        packed, absmax = mk.quantize_reference(whole, levels(bits))
        yield f"quantize {bits} bits: differing codes", differing(got.packed, packed), 0
        yield f"quantize {bits} bits: differing scales", differing(got.absmax, absmax), 0
        nearest = (mk.dequant_reference(odd, torch.float32) - dense).abs().max() / dense.abs().max()
        yield f"quantize {bits} bits, ragged: largest error", float(nearest), 0.5 if bits == 2 else 0.2


def decoded(w: mk.Weight, dtype: torch.dtype) -> Tensor:
    """What the fused kernels make of a weight, in the same arithmetic with torch on the CPU (single scales)."""
    if lookup_for(arch_of(torch.device(DEVICE)), dtype, 4) != "prmt":
        return mk.dequant_reference(w, dtype).cpu()
    codes = torch.stack([w.packed.cpu() >> 4, w.packed.cpu() & 15], 1).flatten().long()
    factor = prescale(w.levels, dtype)
    table = (torch.tensor(w.levels, dtype=torch.float64) * factor).to(dtype).double()
    scales = (w.absmax.cpu() * torch.tensor(1 / factor)).repeat_interleave(w.blocksize)
    coarse = scales.to(dtype)
    fine = (scales - coarse.float()).to(dtype).double()
    low = (table[codes] * fine).to(dtype).double()
    return (table[codes] * coarse.double() + low).to(dtype).view(w.shape)


def check_lookup() -> Iterator[Check]:
    """The product with the identity is the decoded weight itself: the assembly, byte by byte."""
    k = 128 if INTERPRET else 256
    w = weight(k, k, nested=False)
    w = type(w)(**{**vars(w), "packed": torch.arange(k * k // 2).to(torch.uint8).to(DEVICE)})  # every byte
    for dtype in (HALF,) if INTERPRET else (torch.bfloat16, torch.float16):
        eye, want = torch.eye(k, device=DEVICE, dtype=dtype), decoded(w, dtype)
        # A double rounding of the emulation may differ in one of very many.
        yield f"look-up in linear, {dtype}: differing", differing(mk.nf4_linear(eye, w, path="fused").T, want), 1e-4
        yield f"look-up in dgrad, {dtype}: differing", differing(mk.nf4_dgrad(eye, w, path="fused"), want), 1e-4


def cases(tiny: Size, *shapes: Size) -> list[tuple[int, int, int, bool, int, torch.dtype]]:
    """``(M, N, K, nested, r, dtype)``: every shape once, the last in all ways (each is compiled anew, which takes seconds)."""
    half = HALF if INTERPRET else torch.float16
    shapes = (tiny,) if INTERPRET else shapes
    ways = [(False, 0, HALF), (True, 33, HALF), (True, 16, half)]
    return [(*shape, True, 16, HALF) for shape in shapes] + [(*shapes[-1], *way) for way in ways]


def check_linear() -> Iterator[Check]:
    for m, n, k, nested, r, dtype in cases(
        (33, 130, 128), (1, 4096, 4096), (65, 1030, 512), (300, 576, 1024), (2049, 4096, 4096)
    ):
        w, x = weight(n, k, nested=nested), draw(m, k, dtype=dtype)
        low = (draw(m, r, dtype=dtype), draw(n, r, dtype=torch.float32)) if r else (None, None)
        bias = draw(n, dtype=dtype)
        with poisoned():
            got = mk.nf4_linear(x, w, *low, bias, path="fused")
        exact = mk.linear_reference(x.double(), w, *(None if t is None else t.double() for t in low), bias)
        yield f"linear M{m} N{n} K{k} r{r} nested={nested} {dtype}", error(got, exact), LIMIT[dtype]
        decoded_first = error(mk.nf4_linear(x, w, *low, bias, path="dequant"), exact)
        yield (
            f"linear M{m} N{n} K{k} r{r}: error over that of decode-then-product",
            error(got, exact) / decoded_first,
            1.25,
        )
    w, x = weight(192, 256, bits=2), draw(70, 256)
    yield "linear 2 bits", error(mk.nf4_linear(x, w, path="fused"), mk.linear_reference(x.double(), w)), LIMIT[HALF]


def check_dgrad() -> Iterator[Check]:
    for m, n, k, nested, r, dtype in cases(
        (33, 64, 192), (1, 4096, 4096), (65, 1024, 512), (300, 512, 576), (2049, 4096, 4096)
    ):
        w, dy = weight(n, k, nested=nested), draw(m, n, dtype=dtype)
        low = (draw(m, r, dtype=dtype), draw(r, k, dtype=torch.float32)) if r else (None, None)
        with poisoned():
            got = mk.nf4_dgrad(dy, w, *low, path="fused")
        exact = mk.dgrad_reference(dy.double(), w, *(None if t is None else t.double() for t in low))
        yield f"dgrad M{m} N{n} K{k} r{r} nested={nested} {dtype}", error(got, exact), LIMIT[dtype]
    w, dy = weight(130, 65), draw(9, 130)
    yield (
        "dgrad of a shape that does not divide",
        error(mk.nf4_dgrad(dy, w), mk.dgrad_reference(dy.double(), w)),
        2 * LIMIT[HALF],
    )


def check_gemv() -> Iterator[Check]:
    for m, n, k, nested, r, dtype in cases(
        (5, 130, 128), (1, 4096, 4096), (16, 14336, 4096), (32, 1030, 512), (40, 64, 14336)
    ):
        w, x = weight(n, k, nested=nested), draw(m, k, dtype=dtype)
        low = (draw(m, r, dtype=dtype), draw(n, r, dtype=torch.float32)) if r else (None, None)
        with poisoned():
            got = mk.nf4_gemv(x, w, *low)
        exact = mk.gemv_reference(x.double(), w, *(None if t is None else t.double() for t in low))
        yield f"gemv M{m} N{n} K{k} r{r} nested={nested} {dtype}", error(got, exact), LIMIT[dtype]
        yield f"gemv M{m} N{n} K{k} r{r}: differs on a second run", differing(got, mk.nf4_gemv(x, w, *low)), 0


def check_thin() -> Iterator[Check]:
    for m, n, k, r in (
        [(70, 130, 100, 5)] if INTERPRET else [(70, 130, 100, 5), (4096, 4096, 4096, 16), (1000, 14336, 4096, 64)]
    ):
        x, a, b, dy, xa = (
            draw(m, k),
            draw(r, k, dtype=torch.float32),
            draw(n, r, dtype=torch.float32),
            draw(m, n),
            draw(m, r),
        )
        with poisoned():
            down, (dyb, db), da = (
                mk.lora_down(x, a, 0.5),
                mk.lora_bwd_b(dy, b, xa, 0.5),
                mk.lora_bwd_a(xa, x, torch.float32),
            )
        rounded_b, rounded_a = b.to(HALF).double(), a.to(HALF).double()
        yield f"lora_down {m}x{k} r{r}", error(down, mk.lora_down_reference(x.double(), rounded_a, 0.5)), LIMIT[HALF]
        want_dyb, want_db = mk.lora_bwd_b_reference(dy.double(), rounded_b, xa, 0.5)
        yield f"lora_bwd_b {m}x{n} r{r}: dy B", error(dyb, want_dyb), LIMIT[HALF]
        yield f"lora_bwd_b {m}x{n} r{r}: dB", error(db, want_db), LIMIT[HALF]
        yield f"lora_bwd_a {m}x{k} r{r}", error(da, mk.lora_bwd_a_reference(xa, x.double())), LIMIT[HALF]


def check_graph() -> Iterator[Check]:
    """The same results when replayed from a CUDA graph, on new inputs in the same memory."""
    if INTERPRET:
        return
    w = weight(4096, 4096)
    for m, name, call in ((8, "gemv", mk.nf4_gemv), (512, "linear", mk.nf4_linear), (512, "dgrad", mk.nf4_dgrad)):
        x, new = draw(m, 4096), draw(m, 4096)
        call(x, w)  # compiles, uploads tables
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x, w)
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        yield f"{name} from a CUDA graph: differing", differing(out, call(new, w)), 0


def check_step() -> Iterator[Check]:
    """A whole QLoRA step of minilora: loss and gradients on the device in bf16 against the CPU in fp32."""
    try:
        import minilora
    except ImportError as missing:
        print(f"SKIP  a QLoRA step: minilora cannot be imported here ({missing})")
        return
    size = (64, 96) if INTERPRET else (512, 1408)

    def gradients(device: str, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(size[0], size[1]), torch.nn.Tanh(), torch.nn.Linear(size[1], size[0])
        )
        minilora.quantize_model(model, minilora.QuantConfig("nf4", double_quant=True))
        minilora.get_peft_model(
            model, minilora.LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", init_lora_weights=False)
        )
        x, goal = torch.randn(300, size[0]), torch.randn(300, size[0])
        model.to(device, dtype)
        loss = (model(x.to(device, dtype)) - goal.to(device, dtype)).float().square().mean()
        loss.backward()
        return float(loss.detach()), {
            name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None
        }

    loss, grads = gradients(DEVICE, HALF)
    want_loss, want = gradients("cpu", torch.float32)
    most = 1e-5 if INTERPRET else 2e-2
    yield "QLoRA step: loss", abs(loss - want_loss) / want_loss, most
    for name in want:
        yield f"QLoRA step: gradient of {name}", error(grads[name], want[name]), 2 * most


STAGES: dict[str, Callable[[], Iterator[Check]]] = {
    "dequant": check_dequant,
    "lookup": check_lookup,
    "linear": check_linear,
    "dgrad": check_dgrad,
    "gemv": check_gemv,
    "thin": check_thin,
    "graph": check_graph,
    "step": check_step,
}
