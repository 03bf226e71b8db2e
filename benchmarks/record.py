"""What every benchmark writes beside its figures, and where: hardware, versions, commit; a CSV file."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def stamp(*packages: str) -> dict[str, str]:
    """Commit, processor (no host name), whether it multiplies bf16, and the versions of torch and of ``packages``."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"commit": commit, "cpu": processor(), "bf16 products": str(bf16), "torch": torch.__version__, **versions}


def processor() -> str:
    """The processor's own name, and its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len([line for line in lines if line.startswith('processor')])} cores"


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]], marks: dict[str, str]) -> None:
    """One line a row, each with the stamp."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *marks])
        writer.writeheader()
        writer.writerows(row | marks for row in rows)
