"""What do K fine-tunings in one pass cost beside K runs of minilora, and of PEFT?

    python benchmarks/sweep.py [--rounds N] [--counts 1,2,4,8,16] [--models bytes,smollm2] [--device cuda --hidden 2048 --layers 16]

Every run is a process of its own, one thread, and does the same steps: rank 8 on every linear layer, AdamW, a rate and a seed for each of
the K. "bytes" is a Llama of 0.8 million weights with 16 x 128 tokens a step; "smollm2" is SmolLM2-135M in NF4 (PEFT: bitsandbytes' NF4)
with 4 x 128 tokens. Time is the processor's, of loading and of the steps apart; memory is the process's peak that no file stands behind.
K separate runs take K times the time of one, and as much memory together as K of them. Of K runs the pass's ratio is given to each: below
1, the pass is cheaper. With ``--device cuda`` the model is random, of the given size, in bf16 on NF4, a row of 128 tokens a step, and
time the wall's. Writes ``results/sweep.csv`` (``sweep_<card>.csv``).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, stamp, write_csv

from minilora import LoraConfig, QuantConfig, quantize_model
from minilora.data.encoding import Encoded
from minilora.lab import Trial, sweep
from minilora.measure.worker import anonymous_bytes, peak_anonymous_bytes, reset_peak
from minilora.training.settings import TrainConfig

SIZES = {"bytes": (16, 128), "smollm2": (4, 128), "random": (1, 128)}  # rows, tokens of a step


def bytes_model(hidden: int = 128, layers: int = 4, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random Llama; of 0.8 million weights by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(4, hidden // 128)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=260, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def model_of(options: argparse.Namespace) -> Any:
    """The frozen base of a side."""
    if options.model == "bytes":
        return bytes_model()
    if options.model == "random":
        model = bytes_model(options.hidden, options.layers, options.device, torch.bfloat16)
        return quantize_model(model, QuantConfig(double_quant=True))
    from cpu_steps import smollm2

    return smollm2(30, torch.float32, "peer" if options.side == "peft" else "ours")


def examples_of(rows: int, length: int, vocabulary: int, steps: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    made = torch.randint(3, vocabulary, (rows * steps, length), generator=draw).tolist()
    return [Encoded(tuple(ids), tuple(ids)) for ids in made]


def ours(model: Any, options: argparse.Namespace, examples: list[Encoded], rows: int) -> None:
    """K trials in one pass; one of them is a run of its own."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trials = [
        Trial(lora, TrainConfig(steps=options.steps, lr=1e-4 * (1 + k), batch_size=rows, seed=k, pack="off"))
        for k in range(options.trials)
    ]
    sweep(model, examples, trials, together=options.side == "sweep", say=lambda line: None)


def peft(model: Any, options: argparse.Namespace, examples: list[Encoded], rows: int) -> None:
    """One run of PEFT in the plainest loop."""
    from peft import LoraConfig as Config
    from peft import get_peft_model

    config = Config(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    for step in range(options.steps):
        batch = examples[step * rows : (step + 1) * rows]
        ids = torch.tensor([example.input_ids for example in batch], device=options.device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def child(options: argparse.Namespace) -> dict[str, float]:
    """One process: loads, does a step to warm up, then the steps."""
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    on_gpu, start, begun = options.device == "cuda", anonymous_bytes(), clock()
    model = model_of(options)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loaded = clock() - begun
    rows, length = SIZES[options.model]
    examples = examples_of(rows, length, min(250, model.config.vocab_size), options.steps)
    side: Any = peft if options.side == "peft" else ours
    if on_gpu:  # compiles kernels
        side(model, argparse.Namespace(**vars(options) | {"steps": 2}), examples, rows)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    begun = clock()
    side(model, options, examples, rows)
    if on_gpu:
        torch.cuda.synchronize()
    taken = clock() - begun
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_anonymous_bytes() - start
    return {"load s": loaded, "steps s": taken, "peak MB": peak / 2**20}


def measured(side: str, model: str, trials: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--models", model, "--trials", str(trials)]
    for name in ("steps", "device", "hidden", "layers", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each K: medians over the rounds, in each of which all sides were measured one after the other."""
    counts = [int(count) for count in options.counts.split(",")]
    found: dict[Any, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for side, trials in [
            ("ours", 1),
            *([("peft", 1)] if not options.no_peft else []),
            *(("sweep", k) for k in counts),
        ]:
            found.setdefault((side, trials), []).append(measured(side, model, trials, options))
            print(side, trials, found[side, trials][-1], flush=True)
    rows = []
    for k in counts:
        row: dict[str, Any] = {"model": model, "device": options.device, "K": k, "steps": options.steps}
        both = list(zip(found["sweep", k], found["ours", 1], strict=True))
        for name in ("load s", "steps s", "peak MB"):
            row[f"pass {name}"] = f"{statistics.median(one[name] for one, _ in both):.2f}"
            row[f"run {name}"] = f"{statistics.median(one[name] for _, one in both):.2f}"
        row["steps / K runs"] = _ratios([one["steps s"] / (k * run["steps s"]) for one, run in both])
        row["whole / K runs"] = _ratios([_whole(one) / (k * _whole(run)) for one, run in both])
        row["memory / K runs"] = _ratios([one["peak MB"] / (k * run["peak MB"]) for one, run in both])
        if not options.no_peft:
            peers = list(zip(found["peft", 1], found["sweep", k], strict=True))
            row["K of PEFT / steps"] = _ratios([k * peer["steps s"] / one["steps s"] for peer, one in peers])
            row["K of PEFT / memory"] = _ratios([k * peer["peak MB"] / one["peak MB"] for peer, one in peers])
        rows.append(row | {"rounds": options.rounds, "threads": options.threads})
        print(rows[-1], flush=True)
    return rows


def _whole(one: dict[str, float]) -> float:
    return one["load s"] + one["steps s"]


def _ratios(values: list[float]) -> str:
    """The median, with the least and the most behind it."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", default="1,2,4,8,16")
    parser.add_argument("--models", default="bytes,smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hidden", type=int, default=2048, help="width of the random model on a GPU")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # one measurement, in this process
    parser.add_argument("--trials", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        options.model = options.models
        print(json.dumps(child(options)))
        return
    models = ["random"] if options.device == "cuda" else options.models.split(",")
    rows = [row for model in models for row in rows_of(model, options)]
    card = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()) if options.device == "cuda" else ""
    marks = stamp("transformers") | ({"card": torch.cuda.get_device_name()} if card else {})
    write_csv(options.out / (f"sweep_{card}.csv" if card else "sweep.csv"), rows, marks)


if __name__ == "__main__":
    main()
