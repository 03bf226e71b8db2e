"""What does LoRA on the experts of a mixture cost, beside PEFT's, and beside the same layer without adapters?

    python benchmarks/experts.py [--rounds N] [--cells 8,2,256,128 64,8,256,1024] [--out FILE]

A step is forward and backward of one experts module of Qwen3-MoE, one thread, fp32: the gradients of the tokens, of the router's weights
and of the factors (r = 16, both projections). "frozen" is the module alone, as transformers computes it by default, with the gradient of
its inputs; "packed" is minilora's adapter on experts in NF4 with double quantization. All take turns in one process; before that,
minilora and PEFT have loaded one adapter file and shown the same outputs. Time is the processor's, the median of the rounds. Memory is the
layer's tensors, and what a step adds at its peak to a process of its own per side. Writes ``results/experts.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from comparison import interleave
from experts_layer import ALPHA, SIDES, Cell, R, Step, write_adapter
from record import RESULTS, stamp, write_csv

from minilora.measure.worker import Worker

CELLS = [Cell(e, k, h, t) for h in (256, 1024) for e in (8, 64) for k in (2, 8) for t in (128, 1024)]


def row(cell: Cell, rounds: int) -> dict[str, Any]:
    """Times of one size, and how far the two libraries are apart."""
    with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
        write_adapter(cell, folder)
        steps = {side: Step(side, cell, folder) for side in SIDES}
    apart = differ(steps["ours"], steps["peer"])
    if apart > 1e-5:
        raise RuntimeError(f"{cell}: the two libraries differ by {apart:.1e}")
    samples = interleave({side: step.step for side, step in steps.items()}, rounds)
    ms = {side: 1e3 * statistics.median(sample.cpu) for side, sample in samples.items()}
    made: dict[str, Any] = dict(cell._asdict()) | {"inner": cell.inner, "r": R, "lora_alpha": ALPHA, "rounds": rounds}
    for side, sample in samples.items():
        made |= {f"{side} ms": f"{ms[side]:.4g}", f"{side} ms least": f"{1e3 * min(sample.cpu):.4g}"}
        made |= {f"{side} ms most": f"{1e3 * max(sample.cpu):.4g}"}
    for one, other in (("peer", "ours"), ("ours", "frozen"), ("packed", "frozen")):
        made[f"{one} / {other}"] = f"{ms[one] / ms[other]:.3g}"
    return made | {"differ by": f"{apart:.1e}"}


def differ(ours: Step, peer: Step) -> float:
    """The largest relative difference of the outputs, the gradients of what goes in, and of all that a factor gets (its norm)."""
    mine, theirs = ours.found(), peer.found()
    pairs = [(one, other) for one, other in zip(mine[:3], theirs[:3], strict=True)]
    pairs.append(tuple(torch.stack([part.norm() for part in found[3:]]) for found in (mine, theirs)))  # type: ignore[arg-type]
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def memory(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """MB of each side for each cell, and the shares that are asked about."""
    rows = []
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker("experts_layer:memory", {"side": side}, 1)) for side in SIDES}
        for cell in cells:
            found = {side: worker.ask(list(cell)) for side, worker in workers.items()}  # type: ignore[arg-type]
            made: dict[str, Any] = {}
            for side, sizes in found.items():
                made |= {f"{side} {what} MB": f"{size / 1e6:.4g}" for what, size in sizes.items()}
            made["memory ours / peer"] = f"{found['ours']['step'] / found['peer']['step']:.3f}"
            whole = {side: found[side]["layer"] + found[side]["step"] for side in found}
            rows.append(made | {"memory packed / frozen": f"{whole['packed'] / whole['frozen']:.3f}"})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", nargs="+", metavar="E,k,H,T", help="experts, experts for a token, width, tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    cells = [Cell(*map(int, cell.split(","))) for cell in options.cells] if options.cells else CELLS
    rows, marks = [], stamp("peft", "transformers")
    for cell, sizes in zip(cells, memory(cells), strict=True):
        rows.append(row(cell, options.rounds) | sizes)
        print(rows[-1], flush=True)
        write_csv(options.out, rows, marks)


if __name__ == "__main__":
    main()
