"""How fast is minilora on this processor, beside the installed peft and bitsandbytes? Every figure of both comes from one run.

    python benchmarks/cpu.py [--quick] [--rows quantize "lora step fp32"] [--threads 1 2] [--readme]

Variants take turns in one process, so that a busy machine slows all alike; each is measured in processor time and in wall time, median,
minimum and maximum of five rounds or more. Steps start from the same weights (through one adapter file) and their losses are compared
before anything is timed. ``ONEDNN_MAX_CPU_ISA=AVX2`` in the environment makes torch take a processor for one without bf16 products.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from record import RESULTS, into_readme, stamp, write_csv
from torch import nn

import minilora
from minilora import QuantConfig, QuantLinear
from minilora.quant.blockwise import quantize

R, BATCH, LENGTH = 16, 4, 128
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Setting:
    """Rounds and sizes of a run."""

    rounds: int = 5
    quick: bool = False

    def layers(self, full: int) -> int:
        return min(full, 1) if self.quick else full


@dataclass
class Sample:
    """Seconds (or bytes) of every round."""

    cpu: list[float]
    wall: list[float]


@dataclass
class Row:
    """One comparison: ``kind`` says what the ratio is.

    "time": peer / ours. "overhead": (peer - its floor) / (ours - our floor). "bytes": ours / peer, the smaller the better.
    """

    name: str
    goal: str
    kind: str
    samples: dict[str, Sample]
    note: str = ""

    def ratio(self, clock: str = "cpu") -> float:
        middle = {name: statistics.median(getattr(sample, clock)) for name, sample in self.samples.items()}
        if self.kind == "time":
            return middle["peer"] / middle["ours"]
        if self.kind == "bytes":
            return middle["ours"] / middle["peer"]
        cost = middle["ours"] - middle["floor"]  # lost in the noise if it is not positive
        return (middle["peer"] - middle["peer floor"]) / cost if cost > 0 else math.inf

    def reached(self) -> bool:
        wanted = float(self.goal.split()[1])
        return self.ratio() <= wanted if self.goal.startswith("<=") else self.ratio() >= wanted


def interleave(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Sample]:
    """Every variant in turn, ``rounds`` times, after one call that is not counted; short ones several times a round."""
    inner = {}
    for name, call in variants.items():
        call()
        began = time.perf_counter()
        call()
        inner[name] = max(1, min(200, int(0.02 / max(time.perf_counter() - began, 1e-6))))
    samples = {name: Sample([], []) for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(inner[name]):
                call()
            samples[name].cpu.append((time.process_time() - cpu) / inner[name])
            samples[name].wall.append((time.perf_counter() - wall) / inner[name])
    return samples


# --- the formats ---


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


# --- steps of SmolLM2 ---


def smollm2(layers: int, dtype: torch.dtype, packed: str = "") -> Any:
    """The model with its first ``layers`` layers, trained mode; ``packed`` by "ours" or "peer": NF4 with double quantization."""
    from minilora.hf import load_model

    model = load_model("smollm2", dtype)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.use_cache = False
    model.requires_grad_(False)
    if packed == "ours":
        minilora.quantize_model(model, QuantConfig("nf4", double_quant=True))
    elif packed == "peer":
        _pack_as_bitsandbytes(model, dtype)
    return model.train()


def _pack_as_bitsandbytes(model: Any, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for path, layer in [(p, m) for p, m in model.model.named_modules() if isinstance(m, nn.Linear)]:
        options = {"quant_type": "nf4", "compress_statistics": True}
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, **options)
        new.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, **options)
        parent, _, name = path.rpartition(".")
        setattr(model.model.get_submodule(parent), name, new.to("cpu"))


def adapter_folder(layers: int, dropout: float) -> str:
    """An adapter with random A and B, which both libraries load."""
    folder, model = tempfile.mkdtemp(prefix="minilora-bench-"), smollm2(layers, torch.float32)
    config = minilora.LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
    )
    minilora.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01, generator=draw)
    model.save_pretrained(folder)
    return folder


class Steps:
    """A model and its optimizer: ``step()`` is forward, backward and AdamW on one batch of 4 x 128 tokens."""

    def __init__(self, library: str, layers: int, dtype: torch.dtype, packed: bool, folder: str = "") -> None:
        import peft

        side = "ours" if library in ("ours", "floor") else "peer"
        self.model = smollm2(layers, dtype, side if packed else "")
        if library == "ours":
            self.model = minilora.PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        elif library == "peer":
            self.model = peft.PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        else:  # the frozen model alone, the gradient going all the way down
            self.model.enable_input_require_grads()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.tokens = torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def rows_step(setting: Setting, dtype: torch.dtype, packed: bool, layers: int, goals: dict[str, str]) -> Iterator[Row]:
    """Time of a step, and of what the adapters add to the frozen model; equal losses first."""
    layers = setting.layers(layers)
    folder = adapter_folder(layers, 0.0)
    names = ["ours", "peer", *(["floor", *(["peer floor"] if packed else [])] if "overhead" in goals else [])]
    models = {name: Steps(name, layers, dtype, packed, folder) for name in names}
    first = {name: models[name].step() for name in ("ours", "peer")}
    if abs(first["ours"] - first["peer"]) > (1e-4 if dtype == torch.float32 else 3e-2) * first["peer"]:
        raise RuntimeError(f"the losses differ: {first}")
    samples = interleave({name: model.step for name, model in models.items()}, setting.rounds)
    kind = str(dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
    said = f"SmolLM2, {layers} of 30 layers, all-linear r={R}, {BATCH}x{LENGTH}; loss {first['ours']:.4f} / {first['peer']:.4f}"
    name = f"{'QLoRA' if packed else 'LoRA'} step, {kind}"
    if "time" in goals:
        yield Row(name, goals["time"], "time", samples, said)
    if "overhead" in goals:
        samples.setdefault("peer floor", samples["floor"])
        yield Row(f"{name}, cost over the frozen model", goals["overhead"], "overhead", samples, said)


def rows_saved(setting: Setting) -> Iterator[Row]:
    """Bytes that autograd keeps because of the adapters, with dropout 0.05."""
    layers = setting.layers(4)
    folder = adapter_folder(layers, 0.05)
    kept = {}
    for name in ("floor", "ours", "peer"):
        model = Steps(name, layers, torch.float32, False, folder)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
        kept[name] = float(_saved_bytes(model.loss, own))
    added = {name: Sample([kept[name] - kept["floor"]], [kept[name] - kept["floor"]]) for name in ("ours", "peer")}
    note = f"SmolLM2, {layers} layers, fp32; the frozen model keeps {kept['floor'] / 1e6:.0f} MB"
    yield Row("activations saved by the adapters, dropout 0.05", "<= 0.333", "bytes", added, note)


def _saved_bytes(function: Callable[[], Any], leave_out: set[int]) -> int:
    storages: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function()
    del held
    return sum(size for place, (size, _) in storages.items() if place not in leave_out)


PEAK = """
import sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads({threads})
import cpu

def line(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

steps = cpu.Steps({library!r}, {layers}, torch.float32, True, {folder!r})
import gc; gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = line("VmRSS")
steps.step()
print("PEAK", line("VmHWM") - before)
"""


def rows_memory(setting: Setting) -> Iterator[Row]:
    """Peak of a QLoRA step in a fresh process each, over what the loaded model holds before it."""
    layers = setting.layers(8)
    folder = adapter_folder(layers, 0.05)
    samples = {name: Sample([], []) for name in ("ours", "peer")}
    for _ in range(setting.rounds if not setting.quick else 1):
        for name, sample in samples.items():
            fields = {"here": str(Path(__file__).parent), "threads": torch.get_num_threads()}
            program = PEAK.format(library=name, layers=layers, folder=folder, **fields)
            peak = float(_run(program).split("PEAK ")[1])
            sample.cpu.append(peak)
            sample.wall.append(peak)
    note = f"SmolLM2, {layers} layers, NF4 double, fp32, dropout 0.05, first step; resident set over the loaded model"
    yield Row("peak memory of a QLoRA step", "<= 0.8", "bytes", samples, note)


def _run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


# --- latencies ---


def rows_import(setting: Setting) -> Iterator[Row]:
    program = "import time; c, w = time.process_time(), time.perf_counter(); import {}; "
    program += "print(time.process_time() - c, time.perf_counter() - w)"
    samples = {"ours": Sample([], []), "peer": Sample([], [])}
    for turn in range(setting.rounds + 1):
        for name, package in (("ours", "minilora"), ("peer", "peft")):
            cpu, wall = map(float, _run(program.format(package)).split()[-2:])
            if turn:
                samples[name].cpu.append(cpu)
                samples[name].wall.append(wall)
    yield Row("import, against import peft", ">= 3.5", "time", samples, "torch included in both")


def rows_latency(setting: Setting) -> Iterator[Row]:
    """Adapters of 224 layers on a model so small that only the handling counts."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=32)).eval()
    taken: dict[str, dict[str, Sample]] = {}
    token = torch.zeros(1, 1, dtype=torch.long)

    def clock(what: str, who: str, call: Callable[[], Any], count: int = 1) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count):
            result = call()
        sample = taken.setdefault(what, {}).setdefault(who, Sample([], []))
        sample.cpu.append((time.process_time() - cpu) / count)
        sample.wall.append((time.perf_counter() - wall) / count)
        return result

    libraries: list[tuple[str, Any, dict[str, Any]]] = [
        ("ours", minilora, {}),
        ("peer", peft, {"low_cpu_mem_usage": True}),
    ]
    for turn in range(setting.rounds + 1):
        if turn == 1:
            taken.clear()  # the first turn warms up
        with torch.no_grad():
            for who in ("floor", "peer floor"):
                clock("M = 1 forward, cost of the adapters", who, lambda: base(token, use_cache=False), 20)
        for who, library, options in libraries:
            config = library.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
            plain = copy.deepcopy(base)
            with tempfile.TemporaryDirectory() as folder:
                model = clock(
                    "injecting 224 layers", who, lambda p=plain, c=config, lib=library: lib.get_peft_model(p, c)
                )
                clock("saving an adapter", who, lambda m=model, f=folder: m.save_pretrained(f))
                clock(
                    "loading a second adapter",
                    who,
                    lambda m=model, f=folder, o=options: m.load_adapter(f, "second", **o),
                )
            for name in ("second", "default"):
                clock("switching adapters", who, lambda m=model, n=name: m.set_adapter(n))
            model.eval()
            with torch.no_grad():
                clock(
                    "M = 1 forward, cost of the adapters", who, lambda m=model: m(input_ids=token, use_cache=False), 20
                )
    goals = {
        "injecting 224 layers": ">= 10",
        "saving an adapter": ">= 3",
        "loading a second adapter": ">= 10",
        "switching adapters": ">= 10",
    }
    for what, goal in goals.items():
        yield Row(what, goal, "time", taken[what], "224 layers of width 64, r=8; files flushed to the disk by ours")
    yield Row(
        "M = 1 forward, cost of the adapters",
        ">= 2",
        "overhead",
        taken["M = 1 forward, cost of the adapters"],
        "224 layers of width 64, r=8",
    )


# --- the run ---


ROWS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "quantize": rows_quantize,
    "dequantize": rows_dequantize,
    "linear": rows_linear,
    "import": rows_import,
    "latency": rows_latency,
    "saved": rows_saved,
    "memory": rows_memory,
    "lora step fp32": lambda s: rows_step(s, torch.float32, False, 30, {"overhead": ">= 2"}),
    "qlora step fp32": lambda s: rows_step(s, torch.float32, True, 12, {"time": ">= 1", "overhead": ">= 2"}),
    "lora step bf16": lambda s: rows_step(s, torch.bfloat16, False, 2, {"time": ">= 10"}),
    "qlora step bf16": lambda s: rows_step(s, torch.bfloat16, True, 2, {"time": ">= 4"}),
}
ONE_PROCESS = ("import",)  # measured in processes of their own: the number of threads here means nothing to them


def record(row: Row, threads: int) -> dict[str, Any]:
    """A row as a line of the CSV; times in ms, bytes in MB."""
    unit = 1e-6 if row.kind == "bytes" else 1e3
    line: dict[str, Any] = {
        "what": row.name,
        "setting": row.note,
        "threads": threads,
        "kind": row.kind,
        "unit": "MB" if row.kind == "bytes" else "ms",
    }
    for name in ("ours", "peer", "floor", "peer floor"):
        for clock in ("cpu", "wall"):
            values = [value * unit for value in getattr(row.samples[name], clock)] if name in row.samples else []
            for said, choose in (("median", statistics.median), ("min", min), ("max", max)):
                line[f"{name} {clock} {said}"] = f"{choose(values):.5g}" if values else ""
    line |= {
        "rounds": len(row.samples["ours"].cpu),
        "ratio cpu": f"{row.ratio():.3g}",
        "ratio wall": f"{row.ratio('wall'):.3g}",
    }
    return line | {"goal": row.goal, "reached": row.reached()}


def markdown(lines: list[dict[str, Any]]) -> str:
    """What is measured, both sides in processor time with their range, the ratio, and whether the goal is reached."""
    said = ["| what | threads | minilora | peft / bitsandbytes | ratio (wall) | goal |", "|---|---|---|---|---|---|"]
    for line in lines:
        sides = [
            f"{line[f'{s} cpu median']} ({line[f'{s} cpu min']}-{line[f'{s} cpu max']}) {line['unit']}"
            for s in ("ours", "peer")
        ]
        floors = (
            f"; frozen {line['floor cpu median']} / {line['peer floor cpu median']} ms"
            if line["kind"] == "overhead"
            else ""
        )
        goal = line["goal"].replace(">=", "≥").replace("<=", "≤") + ("" if line["reached"] else ", missed")
        setting = f"{line['what']} ({line['setting']}{floors})"
        ratio = f"{line['ratio cpu']} ({line['ratio wall']})"
        said.append(f"| {setting} | {line['threads']} | {' | '.join(sides)} | {ratio} | {goal} |")
    return "\n".join(said)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, small sizes: a smoke run, no figures")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS / "cpu.csv"))
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    setting, lines = Setting(1 if arguments.quick else arguments.rounds, arguments.quick), []
    marks = stamp("peft", "bitsandbytes", "transformers")
    for threads in arguments.threads[: 1 if arguments.quick else None]:
        torch.set_num_threads(threads)
        for name in arguments.rows:
            if name in ONE_PROCESS and threads != arguments.threads[0]:
                continue
            began = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):  # PEFT and minilora greet
                rows = list(ROWS[name](setting))
            for row in rows:
                lines.append(record(row, threads))
                said = lines[-1]
                print(f"{row.name:48s} {threads} threads  ours {said['ours cpu median']:>8s} peer {said['peer cpu median']:>8s} "
                      f"{said['unit']}  ratio {said['ratio cpu']} (wall {said['ratio wall']}), goal {row.goal}"
                      f"{'' if row.reached() else ' MISSED'}  {row.note}", flush=True)  # fmt: skip
            print(f"  {name}: {time.monotonic() - began:.0f} s", flush=True)
    write_csv(arguments.out, lines, marks)
    table = f"{', '.join(f'{key} {value}' for key, value in marks.items())}.\n\n{markdown(lines)}"
    if arguments.readme:
        into_readme("cpu", table)
    print(f"\n{table}\n\n{arguments.out}")


if __name__ == "__main__":
    main()
