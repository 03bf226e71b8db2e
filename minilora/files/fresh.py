"""The environment of a fresh interpreter that imports this very package, wherever it was found. Next file: ``files/hub.py``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["environment"]


def environment(threads: int = 0, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's own, with the folder that holds the package first of all that Python looks in.

    Args:
        threads: of torch and its libraries; 0 leaves them as they are. more: further variables.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} if threads else {}
    return {**os.environ, **counts, **(more or {}), "PYTHONPATH": path}
