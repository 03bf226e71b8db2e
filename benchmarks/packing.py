"""What do packing and the loss without logits save in a training step? Time, padding, and how far the gradient differs.

    python benchmarks/packing.py [--rounds N] [--layers N] [--steps N]

The first layers of SmolLM2-135M in NF4 with double quantization and an adapter of rank 8 on every linear layer; a step is forward and
backward of one micro-batch, one thread, processor time. Three ways take turns: padded with all logits, padded, packed. The demo's
examples are nearly of one length; the long-tailed set has 64 lengths drawn from a lognormal distribution (median 90, sigma 0.9, 16 to
512), a third of each prompt, filled with the demo's tokens. "auto" says what ``--pack auto`` chooses. Writes ``results/packing.csv``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from cpu_steps import smollm2
from record import RESULTS, stamp, write_csv
from torch import Tensor

import minilora
from minilora.data.batches import Collate, collate, micro_batches, split
from minilora.data.encoding import Encoded, encode_all
from minilora.data.packing import collate_packed, saving
from minilora.data.records import read_jsonl
from minilora.data.tokens import IGNORED
from minilora.demo import DATA
from minilora.training.losses import token_losses
from minilora.training.packed import choose_collate
from minilora.training.settings import TrainConfig

WAYS: dict[str, Collate] = {"all logits": collate, "padded": collate, "packed": collate_packed}


def model_of(layers: int) -> Any:
    """The adapted model; B is not zero, so that every gradient is there."""
    model = smollm2(layers, torch.float32, "ours")
    torch.manual_seed(0)
    config = minilora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    minilora.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model


def demo() -> list[Encoded]:
    """The demo's training examples."""
    from minilora.hf.load import load_tokenizer

    return encode_all(split(read_jsonl(DATA), 0.1, 0)[0], load_tokenizer("smollm2"), 128)


def long_tailed(tokens: list[int], count: int = 64) -> list[Encoded]:
    """Examples of lognormal lengths, of these tokens one after the other."""
    draw = torch.Generator().manual_seed(1)
    lengths = (torch.randn(count, generator=draw) * 0.9 + math.log(90)).exp().clamp(16, 512).int().tolist()
    stream, made = itertools.cycle(tokens), []
    for length in lengths:
        ids = tuple(itertools.islice(stream, length))
        made.append(Encoded(ids, (IGNORED,) * (length // 3) + ids[length // 3 :]))
    return made


def step(model: Any, batch: dict[str, Tensor], way: str) -> tuple[float, float, Tensor]:
    """Seconds, loss, and the gradient of all that trains."""
    asked = mock.patch("minilora.training.losses.why_all_logits", return_value="asked for")
    with asked if way == "all logits" else nullcontext():
        begin = time.process_time()
        loss = token_losses(model, batch).mean()
        loss.backward()
        seconds = time.process_time() - begin
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return seconds, loss.item(), torch.cat(gradients)


def row(model: Any, name: str, data: list[Encoded], batch_size: int, rounds: int, steps: int) -> dict[str, Any]:
    """One set of examples: each round does the same steps both ways."""
    batches = list(itertools.islice(micro_batches(data, batch_size, 0), steps))
    tensors = {way: [make(batch, 0) for batch in batches] for way, make in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    apart = loss_apart = 0.0
    step(model, tensors["packed"][0], "packed")  # warms up
    for _ in range(rounds):
        took = dict.fromkeys(WAYS, 0.0)
        for at in range(steps):
            found = {way: step(model, tensors[way][at], way) for way in WAYS}
            for way in WAYS:
                took[way] += found[way][0]
            (_, loss, gradient), _, (_, packed_loss, packed) = found.values()
            apart = max(apart, ((packed - gradient).norm() / gradient.norm()).item())
            loss_apart = max(loss_apart, abs(packed_loss - loss))
        for way in WAYS:
            seconds[way].append(took[way] / steps)
    found_saving = saving(data, batch_size, 0)
    auto = choose_collate(model, data, TrainConfig(batch_size=batch_size), 0, lambda line: None)
    lengths = [len(example.input_ids) for example in data]
    made: dict[str, Any] = {
        "what": f"{name}, batch of {batch_size}", "examples": len(data), "mean length": f"{statistics.mean(lengths):.0f}",
        "longest": max(lengths), "padding": f"{found_saving.padding:.4f}", "padding packed": f"{found_saving.packed:.4f}",
        "tokens times": f"{found_saving.times:.2f}",
    }  # fmt: skip
    for way, each in seconds.items():
        made |= {f"{way} s": f"{statistics.median(each):.3f}", f"{way} s least": f"{min(each):.3f}"}
        made |= {f"{way} s most": f"{max(each):.3f}"}
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    made |= {"all logits / packed": f"{medians['all logits'] / medians['packed']:.2f}"}
    made |= {"padded / packed": f"{medians['padded'] / medians['packed']:.2f}"}
    made |= {"gradient differs by": f"{apart:.1e}", "loss differs by": f"{loss_apart:.1e}"}
    return made | {"auto": "padded" if auto is collate else "packed", "steps": steps, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, short = model_of(chosen.layers), demo()
    tailed = long_tailed([token for example in short for token in example.input_ids])
    rows = []
    for name, data, size in (("demo", short, 4), ("long-tailed", tailed, 8)):
        rows.append(row(model, name, data, size, chosen.rounds, chosen.steps) | {"layers": chosen.layers})
        print(rows[-1], flush=True)
    write_csv(RESULTS / "packing.csv", rows, stamp("transformers"))


if __name__ == "__main__":
    main()
