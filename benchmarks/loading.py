"""How much memory it takes to load a model of 400 million weights straight into NF4, beside bitsandbytes.

    python benchmarks/loading.py            # about three minutes; prints a table, writes benchmarks/results/loading.csv

The first rows load as transformers does, in bf16. "minilora train" is what the commands do, in the dtype that they take on a CPU (fp32,
double quantization), and "loaded, then packed" what they did before: the whole dense model, and the packed one beside it. The last two
are a process of two under torchrun with --shard, the one that took more: each keeps its rows while it reads, or reads all of it first.

Each load is a process of its own. Peak and end are anonymous memory above what the process held just before, in MiB, read every few
milliseconds; a small model is loaded first, so that imports do not count. MALLOC_MMAP_THRESHOLD_=65536 makes the C library give freed
tensors back at once: without it, what it keeps swings by more than what is measured.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "loading.csv"
TRAIN, BEFORE = "minilora train", "loaded, then packed"
SHARDED, SHARED_OUT = "one of two, --shard", "one of two, whole, then shared out"
TOGETHER = (SHARDED, SHARED_OUT)
WAYS = ("minilora", "minilora, double_quant", "bitsandbytes", TRAIN, BEFORE, *TOGETHER)
SIZES = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 12}


def make(folder: str, **sizes: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=1024, num_key_value_heads=4, **sizes)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)


def anonymous() -> float:
    """Anonymous resident memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def options(way: str) -> dict:
    if way == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    from minilora.hf import NF4Config

    return {"quantization_config": NF4Config(double_quant="double" in way)}


def loader(way: str, processes: Any) -> Callable[[str], Any]:
    """What loads a folder in this way."""
    import torch

    if way not in (TRAIN, BEFORE, *TOGETHER):
        from transformers import AutoModelForCausalLM

        return functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16, **options(way))
    from minilora import QuantConfig, quantize_model
    from minilora.hf import load_model

    quant = QuantConfig("nf4", double_quant=True)
    if way == TRAIN:
        return lambda folder: load_model(folder, torch.float32, quant=quant)
    if way in TOGETHER:
        return functools.partial(in_shards, processes, quant, way == SHARED_OUT)
    return lambda folder: quantize_model(load_model(folder, torch.float32), quant)


def in_shards(processes: Any, quant: Any, whole: bool, folder: str) -> Any:
    """A model of which this process keeps its part, after all of it was read or while it is."""
    import torch

    from minilora.hf import load_model
    from minilora.training.rows import Rows
    from minilora.training.sharding import shard_blocks

    rows = None if whole else Rows(processes, torch.float32)
    model = load_model(folder, torch.float32, quant=quant, rows=rows).requires_grad_(False)
    shard_blocks(model, processes)  # which finds nothing to do where the rows came in shards
    gc.collect()
    return model


def footprint_of(model: Any) -> float:
    """Weights and buffers in this process, MiB."""
    each = [*model.parameters(), *model.buffers()]
    return sum((part.to_local() if hasattr(part, "to_local") else part).nbytes for part in each) / 2**20


def load(way: str, small: str, big: str) -> dict[str, float]:
    """One load in this process, or the largest of those of all processes: footprint, peak and end in MiB, seconds."""
    from minilora.training.processes import joined

    with joined() as processes:
        every = processes.share(load_here(way, small, big, processes))
        return {name: max(one[name] for one in every) for name in every[0]}


def load_here(way: str, small: str, big: str, processes: Any) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    read = loader(way, processes)
    read(small)
    gc.collect()
    processes.share("ready")
    start, seen, stop = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen[0] = max(seen[0], anonymous())
            time.sleep(0.003)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = read(big)
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    return {"footprint": footprint_of(model), "peak": seen[0] - start, "end": anonymous() - start, "seconds": seconds}


def in_a_process(way: str, small: str, big: str) -> dict[str, float]:
    several = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if way in TOGETHER else []
    command = [sys.executable, *several, __file__, "--worker", way, small, big]
    setting = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=setting, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "SMALL", "BIG"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = load(*args.worker)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        small, big = f"{place}/small", f"{place}/big"
        make(small, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12)
        make(big, **SIZES | {"num_hidden_layers": args.layers})
        runs: dict[str, list] = {way: [] for way in args.ways}
        for _ in range(args.repeats):  # in turns, so that a busy moment of the machine meets them all
            for way in args.ways:
                runs[way].append(in_a_process(way, small, big))
    print(f"{'':36}{'footprint':>10}{'peak':>8}{'end':>8}  MiB{'peak/footprint':>16}{'seconds':>9}")
    for way, each in runs.items():
        row = {name: round(median(run[name] for run in each), 1) for name in each[0]}
        row["ratio"] = round(row["peak"] / row["footprint"], 2)
        rows.append({"way": way, **row, "peaks": " ".join(f"{run['peak']:.0f}" for run in each)})
        print(
            f"{way:36}{row['footprint']:10.0f}{row['peak']:8.0f}{row['end']:8.0f}{'':5}{row['ratio']:16.2f}{row['seconds']:9.1f}"
        )
    with args.out.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
