"""Compile every shipped launch for five GPUs without having one, and check the machine code.

    python kernels/aot.py [--only linear] [--arch sm_90] [--accept] [--jobs 2]

Each launch must have: no spill and no stack; registers x threads within a processor's 65,536; shared memory within the card's limit;
tensor-core instructions where it multiplies; no warning of ptxas (C75xx: tensor cores serialised); a main loop no longer than
the committed length for this triton version plus 5 % (the whole kernel where it has no loop). ``--accept`` writes the lengths, and
``benchmarks/results/kernels.csv``, which ``docs/kernels.md`` shows. What is launched stands in
``aot_launches.py``, the gates in ``aot_gates.py``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import time
from typing import Any

import triton
from aot_gates import accept, against, baseline, checked
from aot_launches import calls, described, record

from minilora_kernels import launch


def cells(only: str = "", arch: str | None = None) -> list[tuple[str, str]]:
    """The matrix, ``(arch, name)``; a name whose launches another name of that architecture has already is left out."""
    found, seen = [], set()
    for one_arch in launch.ARCHS if arch is None else (arch,):
        for label, call in calls(one_arch).items():
            launches = record(one_arch, label, call)
            same = (one_arch, *((one.fn.__name__, *map(str, described(one)), str(one.options)) for one in launches))
            if only in label and same not in seen:
                seen.add(same)
                found.append((one_arch, label))
    return found


def check_cell(cell: tuple[str, str]) -> list[dict[str, Any]]:
    """All launches of one cell ``(arch, name)`` of the matrix."""
    arch, label = cell
    rows = []
    for one in record(arch, label, calls(arch)[label]):
        try:
            rows.append(checked(one))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            rows.append({"launch": label, "arch": arch, "kernel": one.fn.__name__, "faults": [said]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--arch", choices=launch.ARCHS, help="one architecture")
    parser.add_argument(
        "--accept", action="store_true", help="write lengths and benchmarks/results/kernels.csv (whole matrix only)"
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    whole, version = not options.only and options.arch is None, ".".join(triton.__version__.split(".")[:2])
    start, rows = time.perf_counter(), []
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(check_cell, cells(options.only, options.arch)):
            rows += found
            for row in found:
                print("  ".join(f"{name} {value}" for name, value in row.items() if name != "kernel"), flush=True)
    if not options.accept:
        against(rows, baseline().get(version, {}))
    bad = [row for row in rows if row["faults"]]
    for row in bad:
        print(f"FAULT {row['arch']} {row['launch']} ({row['kernel']}): {'; '.join(row['faults'])}")
    print(
        f"triton {triton.__version__}: {len(rows)} launches in {time.perf_counter() - start:.0f} s, {len(bad)} with faults"
    )
    if options.accept and whole and not bad:
        accept(rows, version)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
