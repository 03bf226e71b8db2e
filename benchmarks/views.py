"""What PEFT's names cost: a step of a small Llama with them (``get_peft_model``), without them (``inject``), and in PEFT.

    python benchmarks/views.py                 # a minute; prints a table, writes benchmarks/results/views.csv

Small layers, so that what stands around them shows. Milliseconds of processor time, medians over the rounds; the three take turns, and a
ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from record import RESULTS, stamp, write_csv
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import minilora

FIELDS = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "without the names": lambda model: minilora.inject(model, minilora.LoraConfig(**FIELDS)),
    "with PEFT's names": lambda model: minilora.get_peft_model(model, minilora.LoraConfig(**FIELDS)),
    "PEFT": lambda model: peft.get_peft_model(model, peft.LoraConfig(**FIELDS)),
}
IDS = torch.arange(16)[None]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=12, **sizes))


@torch.no_grad()
def forward(model: nn.Module) -> None:
    model(IDS)


def step(model: nn.Module) -> None:
    model(IDS).logits.sum().backward()


def timed(work: Callable[[nn.Module], None], model: nn.Module, times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work(model)
    return 1e3 * (time.process_time() - began) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "views.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: make(llama()) for name, make in MAKERS.items()}
    rows = []
    for work in (forward, step):
        for model in models.values():  # what only the first call pays
            timed(work, model, 2)
        rounds = [[timed(work, model, 5) for model in models.values()] for _ in range(options.rounds)]
        for place, name in enumerate(models):
            ratios = [each[place] / each[0] for each in rounds]
            ms = statistics.median(each[place] for each in rounds)
            row = {"what": work.__name__, "side": name, "ms": f"{ms:.2f}", "ratio": f"{statistics.median(ratios):.2f}"}
            rows.append(row | {"ratios": f"{min(ratios):.2f} to {max(ratios):.2f}"})
            print("  ".join(rows[-1].values()))
    write_csv(options.out, rows, stamp("peft", "transformers"))


if __name__ == "__main__":
    main()
