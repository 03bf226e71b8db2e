"""The versions of what a run depends on, for what remembers it and for its report."""

from __future__ import annotations

import platform

import torch

from minilora import __version__
from minilora.hf.folders import import_transformers

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Of minilora, torch, transformers and Python, by name."""
    return {
        "minilora": __version__,
        "torch": str(torch.__version__),
        "transformers": str(import_transformers().__version__),
        "python": platform.python_version(),
    }
