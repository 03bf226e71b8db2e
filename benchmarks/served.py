"""Is the adapter that is served the one that was trained? The loss of the demo's held-out answers, in minilora and in llama.cpp.

    minilora demo --model smollm2.gguf --out runs/served
    minilora demo --out runs/demo
    python benchmarks/served.py runs/served runs/demo [--examples N]

Both programs have the same GGUF file as base: without an adapter, and with the adapter of each run, which llama.cpp gets from ``minilora
export --for llama.cpp --base``. The loss is the mean over all tokens of the answers: minilora computes it as in training, llama.cpp's
server is asked for the log-probability of each token after those before it. Writes ``results/served.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, stamp, write_csv
from serve import serving

from minilora import PeftModel
from minilora.cli import main as minilora
from minilora.cli.demo import job
from minilora.hf import load_model
from minilora.hf.load import resolve
from minilora.job.look import Picked, pick
from minilora.job.record import read_record

BASE = "smollm2.gguf"
LIKELY = 500  # tokens that the server lists at first; a token that is none of them is asked for among all
IGNORED = -100  # the label of a token that does not count


def counted(example: Any) -> list[int]:
    """Places of the tokens that count."""
    return [at for at, label in enumerate(example.labels) if label != IGNORED and at]


def trained_on(run: str) -> str:
    """The base of a run as it was named, and how it lay in memory; "" for a folder that remembers no run."""
    record = read_record(run)
    return f"{record.model}, {record.packing}" if record else ""


def loss_here(picked: Picked, adapter: str) -> float:
    """Of minilora, on the GGUF file."""
    model: Any = load_model(BASE)
    if adapter:
        # Trained on another packing of the base, perhaps: what that costs is the question.
        model = PeftModel.from_pretrained(model, adapter, allow_other_base=True)
    losses = picked.losses(model)
    own = [losses[row][at] for row, example in enumerate(picked.examples) for at in counted(example)]
    return sum(loss for loss in own if loss is not None) / len(own)


def loss_there(picked: Picked, lora: str, vocabulary: int) -> float:
    """Of llama.cpp, on the same file."""
    with serving(BASE, lora) as url:
        own = [
            -log_prob(url, example.input_ids[:at], example.input_ids[at], vocabulary)
            for example in picked.examples
            for at in counted(example)
        ]
    return sum(own) / len(own)


def log_prob(url: str, ids: Sequence[int], wanted: int, vocabulary: int) -> float:
    """Of the token ``wanted`` after these."""
    for listed in (LIKELY, vocabulary):
        asked: dict[str, Any] = {"prompt": list(ids), "n_predict": 1, "n_probs": listed, "temperature": 0}
        # Of the choice alone: after the end of the text, or half a letter, the server would list nothing.
        asked |= {"cache_prompt": True, "post_sampling_probs": False, "logit_bias": [["a", 1e4]]}
        body = json.dumps(asked).encode()
        request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            entries = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        if (found := next((entry["logprob"] for entry in entries if entry["id"] == wanted), None)) is not None:
            return float(found)
    raise SystemExit(f"llama.cpp lists no token {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders of the demo")
    parser.add_argument("--examples", type=int, default=100, help="held-out examples at most (default: all)")
    parser.add_argument("--out", default=str(RESULTS / "served.csv"))
    options = parser.parse_args()
    picked = pick(job("nowhere", model=BASE), options.examples, False, True, print)
    tokens = sum(len(counted(example)) for example in picked.examples)
    vocabulary = len(load_model(BASE).get_input_embeddings().weight)
    print(f"{len(picked.examples)} held-out examples, {tokens} tokens of answers; base {resolve(BASE)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for run in ("", *options.runs):
            lora = str(Path(folder) / f"{len(rows)}.gguf") if run else ""
            if run and minilora(
                ["export", "--adapter", run, "--for", "llama.cpp", "--base", resolve(BASE), "--out", lora]
            ):
                raise SystemExit(f"{run}: was not exported")
            here, there = loss_here(picked, run), loss_there(picked, lora, vocabulary)
            size = os.path.getsize(lora) if lora else 0
            rows.append(
                {
                    "adapter": run or "none",
                    "trained on": trained_on(run) if run else "",
                    "minilora": f"{here:.4f}",
                    "llama.cpp": f"{there:.4f}",
                }
            )
            rows[-1] |= {"difference": f"{there - here:+.4f}", "bytes": size, "tokens": tokens}
            print(
                f"{rows[-1]['adapter']}: minilora {here:.4f}, llama.cpp {there:.4f} ({there - here:+.4f})", flush=True
            )
    write_csv(options.out, rows, stamp("transformers", "xllamacpp"))


if __name__ == "__main__":
    main()
