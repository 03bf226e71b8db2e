"""What ``aot.py`` holds machine code against: limits of the cards, and the lengths committed in ``aot_baseline.json``."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from typing import Any

from aot_launches import Launch, compiled
from aot_machine_code import amd, main_loop, nvidia

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "aot_baseline.json"
RESULTS = HERE.parent / "benchmarks" / "results" / "kernels.csv"
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
WIDE = {"linear_kernel", "dgrad_kernel", "grouped_linear_kernel", "grouped_dgrad_kernel"}


def checked(one: Launch) -> dict[str, Any]:
    """Compile one launch and hold it against the gates: its row of the table, ``faults`` included."""
    start = time.perf_counter()
    kernel, said = compiled(one)
    use, lines = amd(kernel.asm["amdgcn"]) if one.arch.startswith("gfx") else nvidia(kernel.asm["cubin"])
    body = main_loop(lines, TENSOR[one.arch]) or [text for _, text in lines]  # without a loop: all of it
    found = too_large(one, use, kernel.metadata.shared) + too_slow(one, "tt.dot" in kernel.asm["ttir"], body, said)
    return {
        "launch": one.label, "arch": one.arch, "kernel": one.fn.__name__, "registers": use["reg"], "shared": kernel.metadata.shared,
        "length": len(body), "seconds": round(time.perf_counter() - start, 1), "faults": found,
    }  # fmt: skip


def too_large(one: Launch, use: dict[str, int], shared: int) -> list[str]:
    """Faults in what a program occupies: ``use`` as the machine code says, ``shared`` in bytes."""
    is_amd, found = one.arch.startswith("gfx"), []
    threads = one.options.get("num_warps", 4) * (64 if is_amd else 32)
    if use["stack"] or use["local"]:
        found.append(f"spills: stack {use['stack']}, local {use['local']}")
    if not is_amd and use["reg"] * threads > 65536:
        found.append(f"{use['reg']} registers x {threads} threads > 65,536")
    if shared > SHARED[one.arch]:
        found.append(f"shared memory {shared} > {SHARED[one.arch]}")
    return found


def too_slow(one: Launch, multiplies: bool, body: list[str], said: str) -> list[str]:
    """Faults in how the loop ``body`` multiplies, and what ptxas ``said`` of it."""
    # Thin products with a side of 16 use the older instruction on newer cards; the wide ones must use the newest.
    wanted, found = TENSOR[one.arch] if one.fn.__name__ in WIDE else "MMA|mfma", []
    if multiplies and not any(re.search(wanted, text) for text in body):
        found.append(f"no {wanted} in the loop")
    found += [f"ptxas {code}" for code in sorted(set(re.findall(r"C75\d\d", said)))]
    if one.fn.__name__ in WIDE and any("WARPGROUP.DEPBAR.LE gsb0, 0x0" in text for text in body):
        found.append("waits for every product")  # between them stands nothing else to do
    return found


def baseline() -> dict[str, dict[str, int]]:
    """The committed lengths: a version of triton to a launch to instructions."""
    return json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}


def against(rows: list[dict[str, Any]], lengths: dict[str, int]) -> None:
    """Adds a fault to every row that is longer than the committed length allows, or has none."""
    for row in rows:
        allowed = lengths.get(f"{row['arch']} {row['launch']}")
        if allowed is None:
            row["faults"].append("no committed length; look at it, then --accept")
        elif row.get("length", 0) > 1.05 * allowed:
            row["faults"].append(f"length {row['length']} > {allowed} + 5 %")


def accept(rows: list[dict[str, Any]], version: str) -> None:
    """Writes the lengths to the baseline, and what was compiled to the CSV file from which the docs make their tables."""
    known = baseline()
    known[version] = {f"{row['arch']} {row['launch']}": row["length"] for row in rows}
    BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    with RESULTS.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["triton"] != version]
    order = list(dict.fromkeys(row["launch"] for row in rows))  # a launch's architectures stand together
    for row in sorted(rows, key=lambda row: order.index(row["launch"])):
        compiled = {"registers": row["registers"], "shared_kb": f"{row['shared'] / 1024:.0f}", "length": row["length"]}
        lines.append({"triton": version, "launch": row["launch"], "arch": row["arch"], **compiled})
    lines.sort(key=lambda line: [int(part) for part in line["triton"].split(".")])
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, lines[0], lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
