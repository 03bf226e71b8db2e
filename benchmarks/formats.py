"""Which format keeps a language model's output best? KL to the unquantized model, perplexity, and RMSE on normal weights.

    python benchmarks/formats.py [--quick] [--out benchmarks/results/formats.csv]

Two models, because one misleads: SmolLM2's bundled weights already lie on 16 levels per 32 weights, and a byte-level model trained here has
true fp32 weights without outliers. Every format is measured at three block offsets (the flat weights rolled by 0, 16 and 37), so that a
difference can be told from noise. Text for calibration (library source code) is other text than what is measured (documentation).
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, stamp, write_csv

import minilora
from minilora.qlora.quantize_model import quantizable_paths
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig

ROWS: list[tuple[str, QuantConfig]] = [
    ("NF4 (bitsandbytes' codes)", QuantConfig("nf4")),
    ("NF4, double quantization", QuantConfig("nf4", double_quant=True)),
    ("NF4, blocksize 32", QuantConfig("nf4", blocksize=32, double_quant=True)),
    ("NF4, blocksize 128", QuantConfig("nf4", blocksize=128, double_quant=True)),
    ("FP4 (bitsandbytes)", QuantConfig("fp4", double_quant=True)),
    ("FP4 E2M1", QuantConfig("e2m1", double_quant=True)),
    ("INT4", QuantConfig("int4", double_quant=True)),
    ("SF4", QuantConfig("sf4", double_quant=True)),
    ("AF4", QuantConfig("af4", double_quant=True)),
    ("BOF4-S", QuantConfig("bof4s", double_quant=True)),
    ("NF4, least squares", QuantConfig("nf4", double_quant=True, scale="mse")),
    ("NF4, least squares, signed", QuantConfig("nf4", double_quant=True, scale="mse", signed_scale=True)),
    ("NF4, weighted", QuantConfig("nf4", double_quant=True, scale="weighted")),
    ("NF4, weighted, signed", QuantConfig("nf4", double_quant=True, scale="weighted", signed_scale=True)),
    ("AF4, weighted", QuantConfig("af4", double_quant=True, scale="weighted")),
    ("NF3", QuantConfig("nf3", double_quant=True)),
    ("NF3, weighted, signed", QuantConfig("nf3", double_quant=True, scale="weighted", signed_scale=True)),
    ("NF2, weighted, signed", QuantConfig("nf2", double_quant=True, scale="weighted", signed_scale=True)),
    ("INT8", QuantConfig("int8", double_quant=True)),
]
OFFSETS = (0, 16, 37)


class Bench:
    """One model with the log-probabilities of its dense weights on the measured text."""

    def __init__(self, name: str, model: Any, measured: torch.Tensor, calibration: torch.Tensor) -> None:
        self.name, self.model, self.tokens = name, model, measured
        self.paths = quantizable_paths(model, "all-linear")
        self.dense = {path: model.get_submodule(path).weight.detach().clone() for path in self.paths}
        self.importance = minilora.calibrate(model, calibration.split(1))
        self.truth = self.log_probabilities()

    @torch.no_grad()
    def log_probabilities(self) -> list[torch.Tensor]:
        return [self.model(row[None]).logits[0, :-1].float().log_softmax(-1) for row in self.tokens]

    def measure(self, config: QuantConfig, offset: int) -> tuple[float, float]:
        """(KL in nats per token, perplexity) with every linear layer quantized; blocks start ``offset`` weights later."""
        for path, weight in self.dense.items():
            layer = self.model.get_submodule(path)
            if offset == 0:
                packed = quantize(weight, config, path, self.importance[path])
                layer.weight.data.copy_(packed.dequantize())
            else:
                layer.weight.data.copy_(self.rolled(weight, config, path, offset))
        got = self.log_probabilities()
        kl = sum(float((t.exp() * (t - g)).sum()) for t, g in zip(self.truth, got, strict=True))
        loss = sum(float(F.nll_loss(g, row[1:], reduction="sum")) for g, row in zip(got, self.tokens, strict=True))
        count = self.tokens[:, 1:].numel()
        return kl / count, math.exp(loss / count)

    def rolled(self, weight: torch.Tensor, config: QuantConfig, path: str, offset: int) -> torch.Tensor:
        """The weight quantized with other block borders; the importance is rolled along."""
        flat = weight.flatten().roll(-offset).view(1, -1)
        heavy = self.importance[path].expand_as(weight).flatten().roll(-offset)
        return quantize(flat, config, path, heavy).dequantize().flatten().roll(offset).view_as(weight)


def documentation() -> str:
    """About 450 KB of English about Python, which every Python carries."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def source_code() -> str:
    return "\n".join(inspect.getsource(module) for module in (argparse, csv, json, statistics, subprocess))


def smollm2(rows: int) -> Bench:
    from minilora.hf import load_model, load_tokenizer

    tokenizer, model = load_tokenizer("smollm2"), load_model("smollm2")

    def cut(text: str, count: int, length: int = 320) -> torch.Tensor:
        ids = tokenizer(text[: count * length * 40], return_tensors="pt").input_ids[0]
        starts = torch.linspace(0, len(ids) - length - 1, count).long().tolist()
        return torch.stack([ids[start : start + length] for start in starts])

    return Bench("SmolLM2-135M", model, cut(documentation(), rows), cut(source_code(), 5))


def byte_model(rows: int, steps: int = 1500) -> Bench:
    """A Llama of 0.8 M parameters over bytes, trained here on the documentation (four fifths; the rest is measured)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = torch.tensor(list(documentation().encode()), dtype=torch.long)
    border = len(data) * 4 // 5
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, max_position_embeddings=512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        starts = torch.randint(0, border - 129, (16,), generator=draw).tolist()
        batch = torch.stack([data[start : start + 128] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if step % 300 == 0 or step == steps - 1:
            print(f"  byte model: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    model.eval()
    measured = data[border:][: rows * 2 * 256].view(-1, 256)
    code = torch.tensor(list(source_code().encode())[: 12 * 256]).view(-1, 256)
    return Bench("byte model", model, measured, code)


def normal_rmse(config: QuantConfig) -> float:
    weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3)).view(-1, 1024)
    return float((quantize(weights, config, importance=torch.ones(1024)).dequantize() - weights).square().mean().sqrt())


def run(quick: bool) -> list[dict[str, Any]]:
    rows = 2 if quick else 5
    benches = [byte_model(rows, 300 if quick else 1500), smollm2(rows)]
    table = []
    for label, config in ROWS:
        exact = quantize(torch.randn(1 << 20).view(-1, 1024), replace(config, scale="absmax"))
        record: dict[str, Any] = {
            "format": label,
            "bits": round(exact.bits_per_weight, 4),
            "rmse_normal": round(normal_rmse(config), 5),
        }
        for bench in benches:
            began = time.monotonic()
            results = [bench.measure(config, offset) for offset in OFFSETS[: 1 if quick else 3]]
            kl, perplexity = ([r[i] for r in results] for i in (0, 1))
            name = bench.name
            record |= {f"{name} KL": statistics.median(kl), f"{name} KL min": min(kl), f"{name} KL max": max(kl)}
            record |= {f"{name} perplexity": statistics.median(perplexity)}
            print(f"{label:30s} {name:14s} KL {statistics.median(kl):.5f} [{min(kl):.5f} .. {max(kl):.5f}] "
                  f"perplexity {statistics.median(perplexity):.3f}  {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        table.append(record)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer tokens, one offset: minutes instead of half an hour"
    )
    parser.add_argument("--out", default=str(RESULTS / "formats.csv"))
    arguments = parser.parse_args(argv)
    table = run(arguments.quick)
    write_csv(arguments.out, table, stamp("transformers"))
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
