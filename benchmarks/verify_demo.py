"""What ``minilora verify`` says of the demo's adapter on a real model: SmolLM2-135M as it was trained on, packed otherwise, and left out.

    minilora demo --model smollm2.gguf --out runs/served
    python benchmarks/verify_demo.py runs/served    # some minutes; then docs/tables.py

The probe is made three times, on what a run may have as its base: the weights in fp32, the packed blocks of the GGUF file they come from,
and NF4. Each is compared with what llama.cpp serves. Writes ``results/verify_demo.csv``; ``verify.py`` has more cases, of a small model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import RESULTS, stamp, write_csv  # type: ignore[import-not-found,unused-ignore]

from minilora.cli import main as minilora
from minilora.hf import load_model, load_tokenizer
from minilora.hf.gguf_merge import fill_model
from minilora.hf.smollm2 import smollm2_file
from minilora.proof import read_probe, verify
from minilora.proof.verdict import effect
from tests.llama_cpp import serving

# What the probe is made on: the words of `minilora seal`.
BASES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("--model", "smollm2", "--quant", "none"),
    "the Q4_1 file": ("--model", "smollm2.gguf", "--quant", "none"),
    "NF4": ("--model", "smollm2", "--quant", "nf4"),
}
# Probe's base, what is served, the adapter's scale (0: without it).
CASES = (
    ("fp32", "F16", 1.0),
    ("fp32", "Q8_0", 1.0),
    ("fp32", "the Q4_1 file", 1.0),
    ("fp32", "the Q4_1 file", 0.5),
    ("fp32", "F16", 0.0),
    ("the Q4_1 file", "the Q4_1 file", 1.0),
    ("NF4", "F16", 1.0),
    ("NF4", "the Q4_1 file", 1.0),
    ("NF4", "the Q4_1 file", 0.0),
)


def run(*words: str) -> None:
    """A command of minilora's, which must end well."""
    if code := minilora(list(words)):
        raise SystemExit(f"minilora {' '.join(words)}: exit code {code}")


def served_files(place: Path) -> dict[str, Path]:
    """The Q4_1 file, and its numbers in fp16 and in Q8_0."""
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    files = {"F16": place / "f16.gguf", "Q8_0": place / "q8_0.gguf"}
    for name, path in files.items():
        fill_model(model, tokenizer, path, name.lower())
    return files | {"the Q4_1 file": Path(smollm2_file())}


def measured(folder: Path, place: Path) -> list[dict[str, Any]]:
    """A row for each case."""
    files, lora = served_files(place), place / "lora.gguf"
    run("export", "--adapter", str(folder), "--for", "llama.cpp", "--base", "smollm2.gguf", "--out", str(lora))
    for name, words in BASES.items():
        shutil.copytree(folder, place / name, ignore=shutil.ignore_patterns("checkpoint*", "probe.json"))
        run("seal", str(place / name), *words)
    rows = []
    for probed, served, scale in CASES:
        with serving(files[served], lora if scale else None, scale or 1.0, context=1024) as url:
            found = verify(place / probed, url)
        what = served + (f", scale {scale}" if 0 < scale < 1 else "" if scale else ", no adapter")
        row = {"probe on": probed, "served": what, "effect": f"{effect(read_probe(place / probed)):.2f}"}
        row |= {"from the adapted model": f"{found.distances[1]:.4f}", "scale": f"{found.scale:.2f}"}
        rows.append(row | {"verdict": found.kind, "exit code": str(found.code)})
        print(" | ".join(rows[-1].values()), flush=True)
    return rows


def main() -> None:
    """Measure, and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the demo")
    parser.add_argument("--out", type=Path, default=RESULTS / "verify_demo.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = measured(options.run, Path(place))
    write_csv(options.out, rows, stamp("xllamacpp", "gguf", "transformers"))


if __name__ == "__main__":
    main()
