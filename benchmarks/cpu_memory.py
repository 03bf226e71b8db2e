"""How much memory does a step take because of the adapters, beside PEFT's? Run by ``cpu.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from comparison import Row, Sample, Setting, fresh_process
from cpu_steps import Steps, adapter_folder


def rows_saved(setting: Setting) -> Iterator[Row]:
    """Bytes that autograd keeps because of the adapters, with dropout 0.05."""
    layers = setting.layers(4)
    kept = {}
    with adapter_folder(layers, 0.05) as folder:
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
import cpu_steps

def line(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

steps = cpu_steps.Steps({library!r}, {layers}, torch.float32, True, {folder!r})
import gc; gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = line("VmRSS")
steps.step()
print("PEAK", line("VmHWM") - before)
"""


def rows_memory(setting: Setting) -> Iterator[Row]:
    """Peak of a QLoRA step in a fresh process each, over what the loaded model holds before it."""
    layers = setting.layers(8)
    samples = {name: Sample() for name in ("ours", "peer")}
    with adapter_folder(layers, 0.05) as folder:
        for name, sample in list(samples.items()) * setting.rounds:
            fields = {"here": str(Path(__file__).parent), "threads": torch.get_num_threads()}
            program = PEAK.format(library=name, layers=layers, folder=folder, **fields)
            peak = float(fresh_process(program).split("PEAK ")[1])
            sample.add(peak, peak)
    note = f"SmolLM2, {layers} layers, NF4 double, fp32, dropout 0.05, first step; resident set over the loaded model"
    yield Row("peak memory of a QLoRA step", "<= 0.8", "bytes", samples, note)
