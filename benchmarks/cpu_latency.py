"""How long do importing, injecting, saving, loading and switching take, beside PEFT? Run by ``cpu.py``."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from comparison import Row, Sample, Setting, fresh_process
from cpu_steps import ALL_LINEAR

import minilora

Taken = dict[str, dict[str, Sample]]  # what is done, by whom


def rows_import(setting: Setting) -> Iterator[Row]:
    program = "import time; c, w = time.process_time(), time.perf_counter(); import {}; "
    program += "print(time.process_time() - c, time.perf_counter() - w)"
    samples = {"ours": Sample(), "peer": Sample()}
    for turn in range(setting.rounds + 1):
        for name, package in (("ours", "minilora"), ("peer", "peft")):
            cpu, wall = map(float, fresh_process(program.format(package)).split()[-2:])
            if turn:
                samples[name].add(cpu, wall)
    yield Row("import, against import peft", ">= 3.5", "time", samples, "torch included in both")


FORWARD = "M = 1 forward, cost of the adapters"
GOALS = {
    "injecting 224 layers": ">= 10",
    "saving an adapter": ">= 3",
    "loading a second adapter": ">= 10",
    "switching adapters": ">= 10",
}


def rows_latency(setting: Setting) -> Iterator[Row]:
    """Adapters of 224 layers on a model so small that only the handling counts."""
    import peft

    base, token = small_llama(), torch.zeros(1, 1, dtype=torch.long)
    taken: Taken = defaultdict(lambda: defaultdict(Sample))
    for turn in range(setting.rounds + 1):
        if turn == 1:
            taken.clear()  # the first turn warms up
        with torch.no_grad():
            for who in ("floor", "peer floor"):
                taken[FORWARD][who].time(lambda: base(token, use_cache=False), 20)
        handle("ours", minilora, {}, base, token, taken)
        handle("peer", peft, {"low_cpu_mem_usage": True}, base, token, taken)
    for what, goal in GOALS.items():
        yield Row(what, goal, "time", taken[what], "224 layers of width 64, r=8; files flushed to the disk by ours")
    yield Row(FORWARD, ">= 2", "overhead", taken[FORWARD], "224 layers of width 64, r=8")


def small_llama() -> Any:
    """32 layers, seven linear ones in each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=32)).eval()


def handle(who: str, library: Any, loading: dict[str, Any], base: Any, token: torch.Tensor, taken: Taken) -> None:
    """One turn of one library: inject, save, load, switch, forward; ``loading`` are its options of ``load_adapter``."""
    config = library.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    plain = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        model = taken["injecting 224 layers"][who].time(lambda: library.get_peft_model(plain, config))
        taken["saving an adapter"][who].time(lambda: model.save_pretrained(folder))
        taken["loading a second adapter"][who].time(lambda: model.load_adapter(folder, "second", **loading))
    for name in ("second", "default"):
        taken["switching adapters"][who].time(lambda n=name: model.set_adapter(n))
    model.eval()
    with torch.no_grad():
        taken[FORWARD][who].time(lambda: model(input_ids=token, use_cache=False), 20)
