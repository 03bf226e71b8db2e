"""What the token store costs and saves: the first start, the next ones, and memory by token.

    python benchmarks/store.py            # ten minutes on one core; prints a table, writes benchmarks/results/store.csv

A file of 200,000 conversations is made from a seed, lengths as in data that people train on: many short, some long (log-normal). Each row
is a process of its own, one thread. Memory is what the process holds above what it held just before (2,000 other lines
have been encoded then), in bytes a token: ``held`` after the start and a thousand batches, ``peak`` the most until then. ``read`` is the
time of reading the file once with its
hash, which no start can be faster than.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import record

OUT = record.RESULTS / "store.csv"
WORDS = [
    "the",
    "fog",
    "lamp",
    "keeper",
    "sea",
    "ship",
    "light",
    "turns",
    "slowly",
    "wind",
    "over",
    "rocks",
    "answers",
    "below",
]
BATCHES = 1000


def make(path: Path, lines: int) -> None:
    """Conversations of a question and an answer."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            words = draw.choices(WORDS, k=max(4, min(600, int(draw.lognormvariate(4.3, 0.8)))))
            turns = [("user", f"Question {number}: " + " ".join(words[:8]) + "?"), ("assistant", " ".join(words) + ".")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


def resident() -> int:
    """Resident bytes of this process, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(way: str, path: str, cache: str) -> dict[str, float]:
    """One start in this process: seconds until the first batch, the examples, and the bytes."""
    import torch

    from minilora.data import store
    from minilora.data.batches import micro_batches, split
    from minilora.data.encoding import encode_all
    from minilora.data.records import look_at, read_jsonl
    from minilora.hf.load import load_tokenizer
    from minilora.training.meaning import _hash

    torch.set_num_threads(1)
    tokenizer = load_tokenizer("smollm2")
    with (
        tempfile.TemporaryDirectory() as place
    ):  # what libraries load and keep at their first use, some 50 MB, does not count
        make(Path(place, "few.jsonl"), 2000)
        encode_all(list(read_jsonl(Path(place, "few.jsonl"))), tokenizer, 512)
    seen, stop, before = [0], threading.Event(), resident()

    def watch() -> None:
        while not stop.is_set():
            seen[0] = max(seen[0], resident() - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, worked = time.perf_counter(), time.process_time()
    if way == "read":
        look_at(path)
        examples: Any = []
    elif way == "lists":
        examples = encode_all(split(read_jsonl(path), 0.1, 0)[0], tokenizer, 512)
    else:
        data = store.load_data(look_at(path), tokenizer, store.Way(512), Path(cache), say=lambda line: None)
        examples = data.of(split(range(len(data)), 0.1, 0)[0])
    digest = _hash(examples)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    tokens = 0
    if way != "read":
        batches = micro_batches(examples, 8, seed=1)
        for _ in range(BATCHES):
            tokens += sum(len(example.input_ids) for example in next(batches))
    held = resident() - before
    stop.set()
    watcher.join()
    mean = tokens / (8 * BATCHES)
    return {"seconds": seconds, "cpu seconds": cpu, "examples": len(examples), "tokens": mean * len(examples),
            "held": held, "peak": max(seen[0], held), "digest": digest}  # fmt: skip


def in_a_process(way: str, path: Path, cache: Path) -> dict[str, Any]:
    setting = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", way, str(path), str(cache)]
    done = subprocess.run(command, env=setting, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--lists", type=int, default=20_000, help="lines of the way that holds lists in memory")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "FILE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(start(*args.worker)))
        return
    with tempfile.TemporaryDirectory() as place:
        path, some, cache = Path(place, "data.jsonl"), Path(place, "some.jsonl"), Path(place, "cache")
        make(path, args.lines)
        make(some, args.lists)
        megabytes = path.stat().st_size / 1e6
        each = {
            "reading the file once": in_a_process("read", path, cache),
            "first start: the store is made": in_a_process("store", path, cache),
            "next start: the store is there": in_a_process("store", path, cache),
            "lists in memory": in_a_process("lists", some, cache),
        }
        disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    first, second = (
        each[f"{which} start: the store is {word}"] for which, word in (("first", "made"), ("next", "there"))
    )
    if first["digest"] != second["digest"]:
        raise SystemExit("the second start has other examples than the first")
    rows = []
    for what, found in each.items():
        lines = args.lists if what == "lists in memory" else args.lines
        tokens = found["tokens"] or first["tokens"]
        row = {"what": what, "lines": lines, "file MB": round(megabytes * lines / args.lines, 1)}
        row |= {name: round(found[name], 2) for name in ("seconds", "cpu seconds")}
        row |= {"tokens": round(tokens)}
        row |= {f"{name} bytes a token": round(found[name] / tokens, 2) for name in ("held", "peak")}
        rows.append(row | {"disk bytes a token": round(0.9 * disk / tokens, 2) if found is second else ""})
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()))
    record.write_csv(args.out, rows, record.stamp("transformers", "tokenizers"))


if __name__ == "__main__":
    main()
