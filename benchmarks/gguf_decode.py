"""How fast are the blocks of a GGUF file decoded, beside the ``gguf`` package and beside the formula of a few lines that each format is?

    python benchmarks/gguf_decode.py [--quick]     # a minute or two; writes benchmarks/results/gguf_decode.csv

Every format that ``minilora.quant.gguf.formats`` registers, of a large and a small weight with random
bytes. The values are compared bit by bit before
anything is timed. The four take turns in one process with one thread; a figure is the median of the rounds, and a ratio is that of the
medians. The other two give memory of their own, as ``dequantize()`` does; in training a kept buffer is decoded into.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from comparison import Sample, interleave
from record import RESULTS, ROOT, stamp, write_csv

sys.path.insert(0, str(ROOT))

from minilora.quant.gguf.formats import FORMATS
from tests.gguf_blocks import random_blocks

WEIGHTS = ((4096, 4096), (576, 1536))
SCALE = 0.01  # times a normal number: each fp16 number of a block
SIDES = OURS, KEPT, PACKAGE, FORMULA = ("minilora", "minilora, kept buffer", "gguf package", "formula")


def measure(kind: str, rows: int, columns: int, rounds: int) -> dict[str, Sample]:
    """The seconds of every side, one weight of ``[rows, columns]``. Raises ``RuntimeError`` where the values differ in a bit."""
    form = FORMATS[kind]
    weight = random_blocks(kind, rows, columns // form.weights, scale=SCALE)
    blocks, room = weight.packed.view(-1, form.nbytes), torch.empty(rows, columns)
    raw, theirs = weight.packed.numpy(), gguf.GGMLQuantizationType[kind]
    calls: dict[str, Callable[[], Any]] = {
        OURS: weight.dequantize,
        KEPT: lambda: weight.dequantize(out=room),
        PACKAGE: lambda: gguf.quants.dequantize(raw, theirs),
        FORMULA: lambda: form.reference(blocks),
    }
    wanted = torch.from_numpy(calls[PACKAGE]()).view(torch.int32)
    for side in (OURS, KEPT, FORMULA):
        if not torch.equal(calls[side]().view(rows, columns).view(torch.int32), wanted):
            raise RuntimeError(f"{kind}: the values of {side} differ from the gguf package's")
    return interleave(calls, rounds)


def line(kind: str, rows: int, columns: int, rounds: int) -> dict[str, str]:
    """A format's row of the CSV file: milliseconds of the processor, and what the others take of minilora's."""
    form, samples = FORMATS[kind], measure(kind, rows, columns, rounds)
    middle = {side: statistics.median(sample.cpu) for side, sample in samples.items()}
    found = {
        "format": kind,
        "bits": f"{form.bits_per_weight:.4g}",
        "weight": f"{rows}x{columns}",
        "rounds": str(rounds),
    }
    for side, sample in samples.items():
        for said, value in (("", middle[side]), (" min", min(sample.cpu)), (" max", max(sample.cpu))):
            found[f"{side} ms{said}"] = f"{1e3 * value:.4g}"
    return found | {f"{side} / {OURS}": f"{middle[side] / middle[OURS]:.2f}" for side in SIDES[1:]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small weight, one round: a smoke run, no figures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "gguf_decode.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    weights, rounds = (((64, 512),), 1) if options.quick else (WEIGHTS, options.rounds)
    lines = []
    for kind, (rows, columns) in itertools.product(FORMATS, weights):
        lines.append(line(kind, rows, columns, rounds))
        print("  ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
    write_csv(options.out, lines, stamp("gguf"))


if __name__ == "__main__":
    main()
