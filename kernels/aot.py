"""Compile every shipped launch for five GPUs without having one, and check the machine code.

    python kernels/aot.py [--only linear] [--arch sm_90] [--accept] [--jobs 2]

What is compiled is what the wrappers launch: they are called on tensors without memory while ``JITFunction.run`` is replaced by a recorder.
Each launch must have: no spill and no stack; registers x threads within a processor's 65,536; shared memory within the card's limit;
tensor-core instructions where it multiplies; no warning of ptxas (C75xx: tensor cores serialised); a main loop no longer than
the committed length for this triton version plus 5 % (the whole kernel where it has no loop). ``--accept`` writes the lengths, and
``benchmarks/results/kernels.csv``, which ``docs/kernels.md`` shows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import minilora_kernels as mk  # noqa: E402
from minilora_kernels import launch  # noqa: E402
from minilora_kernels.partials import total  # noqa: E402

BASELINE = HERE / "aot_baseline.json"
RESULTS = HERE.parent / "benchmarks" / "results" / "kernels.csv"
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
WIDE = {"linear_kernel", "dgrad_kernel"}
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


# --- what is launched ---


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
    found: dict[str, Any] = {
        "dequant": lambda: mk.nf4_dequant(plain, bf16),
        "dequant nested": lambda: mk.nf4_dequant(double, bf16),
        "quantize": lambda: mk.nf4_quantize(of(4096, 4096), LEVELS),
        "quantize ragged": lambda: mk.nf4_quantize(of(3, 21), LEVELS),
        "lora_down r16": lambda: mk.lora_down(of(4096, 4096), of(16, 4096), 2.0),
        "lora_bwd_b r16": lambda: mk.lora_bwd_b(of(4096, 4096), of(4096, 16), of(4096, 16), 2.0),
        "lora_bwd_a r16": lambda: mk.lora_bwd_a(of(4096, 16), of(4096, 4096)),
        "linear M4096 2 bits": lambda: mk.nf4_linear(of(4096, 4096), weight(bits=2)),
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
        found[f"linear M{m}"] = lambda m=m: mk.nf4_linear(of(m, 4096), plain)
        found[f"linear M{m} nested r16"] = lambda m=m: mk.nf4_linear(of(m, 4096), double, of(m, 16), of(4096, 16))
        found[f"dgrad M{m}"] = lambda m=m: mk.nf4_dgrad(of(m, 4096), plain)
        found[f"dgrad M{m} nested r16"] = lambda m=m: mk.nf4_dgrad(of(m, 4096), double, of(m, 16), of(16, 4096))
    found["linear M4096 r64"] = lambda: mk.nf4_linear(of(4096, 4096), plain, of(4096, 64), of(4096, 64))
    found["dgrad M4096 r64"] = lambda: mk.nf4_dgrad(of(4096, 4096), plain, of(4096, 64), of(64, 4096))
    found["linear M4096 fp16 r16"] = lambda: mk.nf4_linear(
        of(4096, 4096, dtype=f16), plain, of(4096, 16, dtype=f16), of(4096, 16)
    )
    found["linear M4096 bias"] = lambda: mk.nf4_linear(of(4096, 4096), plain, bias=of(4096))
    found["total"] = lambda: total(of(8, 16, 4096, dtype=torch.float32), bf16)
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


# --- what came out ---


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Resources of a cubin, and its instructions as ``(address, text)``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
        sass = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True).stdout
    pairs = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    if not pairs or not lines:
        raise RuntimeError(f"cuobjdump gave nothing to read: {usage[-300:]!r}")
    return {name.lower(): int(value) for name, value in pairs}, [(int(at, 16), text) for at, text in lines]


def amd(assembly: str) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """The same from AMD assembly; labels become addresses."""
    facts = {
        "reg": r"\.vgpr_count:\s+(\d+)",
        "stack": r"\.private_segment_fixed_size:\s+(\d+)",
        "local": r"\.vgpr_spill_count:\s+(\d+)",
    }
    found = {name: int(re.search(pattern, assembly).group(1)) for name, pattern in facts.items()}  # type: ignore[union-attr]
    lines: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.?L\w+):", line):
            labels[label.group(1)] = len(lines)
        elif (text := line.split(";")[0].strip()) and line.startswith("\t") and not text.startswith("."):
            lines.append((len(lines), text))
    return found, [
        (at, re.sub(r"\.?LBB\w+", lambda m: hex(labels.get(m.group(), 1 << 40)), text)) for at, text in lines
    ]


def main_loop(lines: list[tuple[int, str]], tensor: str) -> list[str]:
    """Instructions of the loop with most tensor-core instructions, the shortest of several; a jump back makes a loop."""
    where = {at: i for i, (at, _) in enumerate(lines)}
    end = max((i for i, (_, text) in enumerate(lines) if "EXIT" in text), default=len(lines))
    loops = []
    for i, (at, text) in enumerate(
        lines[:end]
    ):  # what stands after the end are waits moved out of the way, which jump back
        jump = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < at and int(jump.group(1), 16) in where:
            loops.append([text for _, text in lines[where[int(jump.group(1), 16)] : i + 1]])
    return max(loops, key=lambda body: (sum(tensor in text for text in body), -len(body)), default=[])


def checked(one: Launch) -> dict[str, Any]:
    """Compile one launch and hold it against the gates: its row of the table, ``faults`` included."""
    start = time.perf_counter()
    kernel, said = compiled(one)
    is_amd = one.arch.startswith("gfx")
    use, lines = amd(kernel.asm["amdgcn"]) if is_amd else nvidia(kernel.asm["cubin"])
    tensor = TENSOR[one.arch]
    body = main_loop(lines, tensor) or [text for _, text in lines]  # without a loop: all of it
    threads = one.options.get("num_warps", 4) * (64 if is_amd else 32)
    faults = []
    if use["stack"] or use["local"]:
        faults.append(f"spills: stack {use['stack']}, local {use['local']}")
    if not is_amd and use["reg"] * threads > 65536:
        faults.append(f"{use['reg']} registers x {threads} threads > 65,536")
    if kernel.metadata.shared > SHARED[one.arch]:
        faults.append(f"shared memory {kernel.metadata.shared} > {SHARED[one.arch]}")
    # Thin products with a side of 16 use the older instruction on newer cards; the wide ones must use the newest.
    wanted = tensor if one.fn.__name__ in WIDE else "MMA|mfma"
    if "tt.dot" in kernel.asm["ttir"] and not any(re.search(wanted, text) for text in body):
        faults.append(f"no {wanted} in the loop")
    faults += [f"ptxas {code}" for code in sorted(set(re.findall(r"C75\d\d", said)))]
    if one.fn.__name__ in WIDE and any("WARPGROUP.DEPBAR.LE gsb0, 0x0" in text for text in body):
        faults.append("waits for every product")  # between them stands nothing else to do
    return {
        "launch": one.label, "arch": one.arch, "kernel": one.fn.__name__, "registers": use["reg"], "shared": kernel.metadata.shared,
        "length": len(body), "seconds": round(time.perf_counter() - start, 1), "faults": faults,
    }  # fmt: skip


# --- the command ---


def cells(only: str = "", arch: str | None = None) -> list[tuple[str, str]]:
    """The matrix, ``(arch, name)``; a name whose launches another name of that architecture has already is left out."""
    found, seen = [], set()
    for one_arch in launch.ARCHS if arch is None else (arch,):
        for label, call in calls(one_arch).items():
            same = (
                one_arch,
                *(
                    (one.fn.__name__, *map(str, described(one)), str(one.options))
                    for one in record(one_arch, label, call)
                ),
            )
            if only in label and same not in seen:
                seen.add(same)
                found.append((one_arch, label))
    return found


def check_cell(cell: tuple[str, str]) -> list[dict[str, Any]]:
    """All launches of one cell ``(arch, name)`` of the matrix."""
    arch, label = cell
    rows = []
    for one in record(arch, label, calls(arch)[label]):
        try:
            rows.append(checked(one))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            rows.append({"launch": label, "arch": arch, "kernel": one.fn.__name__, "faults": [said]})
    return rows


def against(rows: list[dict[str, Any]], lengths: dict[str, int]) -> None:
    """Adds a fault to every row that is longer than the committed length allows, or has none."""
    for row in rows:
        allowed = lengths.get(f"{row['arch']} {row['launch']}")
        if allowed is None:
            row["faults"].append("no committed length; look at it, then --accept")
        elif row.get("length", 0) > 1.05 * allowed:
            row["faults"].append(f"length {row['length']} > {allowed} + 5 %")


def accept(rows: list[dict[str, Any]], version: str) -> None:
    """Writes the lengths to the baseline, and what was compiled to the CSV file from which the docs make their tables."""
    known = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    known[version] = {f"{row['arch']} {row['launch']}": row["length"] for row in rows}
    BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    with RESULTS.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["triton"] != version]
    for row in rows:
        compiled = {"registers": row["registers"], "shared_kb": f"{row['shared'] / 1024:.0f}", "length": row["length"]}
        lines.append({"triton": version, "launch": row["launch"], "arch": row["arch"], **compiled})
    lines.sort(key=lambda line: [int(part) for part in line["triton"].split(".")])
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, lines[0], lineterminator="\n")
        table.writeheader()
        table.writerows(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--arch", choices=launch.ARCHS, help="one architecture")
    parser.add_argument(
        "--accept", action="store_true", help="write lengths and benchmarks/results/kernels.csv (whole matrix only)"
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    whole, version = not options.only and options.arch is None, ".".join(triton.__version__.split(".")[:2])
    start, rows = time.perf_counter(), []
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(check_cell, cells(options.only, options.arch)):
            rows += found
            for row in found:
                print("  ".join(f"{name} {value}" for name, value in row.items() if name != "kernel"), flush=True)
    if not options.accept:
        lengths = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
        against(rows, lengths.get(version, {}))
    bad = [row for row in rows if row["faults"]]
    for row in bad:
        print(f"FAULT {row['arch']} {row['launch']} ({row['kernel']}): {'; '.join(row['faults'])}")
    print(
        f"triton {triton.__version__}: {len(rows)} launches in {time.perf_counter() - start:.0f} s, {len(bad)} with faults"
    )
    if options.accept and whole and not bad:
        accept(rows, version)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
