"""What do two processes gain beside two threads of one, for many small fine-tunings?

    python benchmarks/sweep_workers.py [--rounds N] [--trials K] [--rows R]

Runs ``minilora sweep`` on a random Llama of 0.8 million weights that reads bytes, in one process of one thread, in one of two threads, and
among two workers of one thread each; in turns, and each once with few steps and once with more, so that loading falls out. Time is the
wall's, of a step of all trials. Writes ``results/sweep_workers.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import RESULTS, stamp, write_csv
from sweep import bytes_model

from minilora.lab.byte_model import code

FEW, MORE = 4, 16  # steps
# Workers, and threads of all of them together.
WAYS = {"one process, 1 thread": (1, 1), "one process, 2 threads": (1, 2), "two workers, 1 thread each": (2, 2)}


def prepare(folder: Path) -> None:
    """``folder/model``, whose tokens are bytes, and ``folder/data.jsonl``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_model().save_pretrained(folder / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: at for at, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0]).save_pretrained(folder / "model")
    text = "".join(map(chr, code()[: 128 * 512])).replace("\0", " ")
    cuts = [text[at : at + 127] for at in range(0, len(text), 127)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": cut}) + "\n" for cut in cuts), encoding="utf-8")


def seconds(folder: Path, way: tuple[int, int], steps: int, options: argparse.Namespace) -> float:
    """Of one command."""
    workers, threads = way
    places = {"model": "model", "data": "data.jsonl", "out": "out"}
    command = [sys.executable, "-m", "minilora", "sweep", "--grid", "lr=1e-4,1e-3", "--overwrite"]
    for name, place in places.items():
        command += [f"--{name}", str(folder / place)]
    asked = {"seeds": options.trials // 2, "steps": steps, "batch-size": options.rows, "max-length": 128}
    for name, value in (asked | {"workers": workers, "quant": "none", "eval-share": 0}).items():
        command += [f"--{name}", str(value)]
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **counts})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=4, help="an even number")
    parser.add_argument("--rows", type=int, default=16, help="of 128 tokens, a step of a trial")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep_workers.csv")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for _ in range(options.rounds):
            for name, way in WAYS.items():
                few, more = (seconds(Path(place), way, steps, options) for steps in (FEW, MORE))
                found[name].append((more - few) / (MORE - FEW))
                print(f"{name}: {found[name][-1]:.2f} s a step", flush=True)
    first = next(iter(WAYS))
    rows = []
    for name, taken in found.items():
        ratios = [own / one for own, one in zip(taken, found[first], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        row = {"way": name, "s a step": f"{statistics.median(taken):.2f}", f"of {first}": spread}
        rows.append(row | {"trials": options.trials, "rows": options.rows, "rounds": options.rounds})
    marks = stamp("transformers") | {"cores": os.cpu_count()}
    write_csv(options.out, rows, marks)


if __name__ == "__main__":
    main()
