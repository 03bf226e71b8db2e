"""The nearest known word to one that is unknown: by its letters, or because other programs call the same thing so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from minilora.errors import nearest

__all__ = ["closest"]

# What PEFT, transformers' Trainer, axolotl, torchtune, mlx-lm and llama.cpp call it: what it is called here.
_OTHER_NAMES = {
    "learning-rate": "lr", "rank": "r", "lora-r": "r", "lora-rank": "r", "alpha": "lora-alpha", "dropout": "lora-dropout",
    "num-train-epochs": "steps", "epochs": "steps", "max-steps": "steps", "iters": "steps", "micro-batch-size": "batch-size",
    "per-device-train-batch-size": "batch-size", "gradient-accumulation-steps": "accumulate", "warmup-ratio": "warmup",
    "max-grad-norm": "clip", "eval-steps": "eval-every", "save-steps": "save-every", "save-total-limit": "keep-checkpoints",
    "base-model": "model", "model-name-or-path": "model", "load-in-4bit": "quant", "torch-dtype": "dtype", "dataset": "data",
    "train-file": "data", "eval-dataset": "eval-data", "eval-file": "eval-data", "validation-file": "eval-data",
    "test-datasets": "eval-data", "val-size": "eval-share", "val-set-size": "eval-share", "default-system": "system",
    "system-prompt": "system",
    "max-seq-length": "max-length", "sequence-len": "max-length", "cutoff-len": "max-length",
    "output": "out", "output-dir": "out", "save-path": "out", "adapter-path": "adapter", "max-tokens": "max-new-tokens",
    "finetune": "train", "fine-tune": "train", "ask": "generate", "chat": "generate", "pack": "quantize", "fuse": "merge",
    "convert": "export", "memory": "plan", "compare": "bench",
}  # fmt: skip


def closest(word: str, known: Iterable[str]) -> str:
    """As ``errors.nearest``, and ``--lerning-rate`` is close to ``--lr``."""
    names = list(known)
    own = {_bare(name): name for name in names}
    others = {other: own[name] for other, name in _OTHER_NAMES.items() if name in own}
    best = difflib.get_close_matches(_bare(word[:100]), [*own, *others], n=1, cutoff=0.75)
    return repr(others[best[0]]) if best and best[0] in others else nearest(word, names)


def _bare(name: str) -> str:
    """Flags, keys in TOML and commands in one form."""
    return name.lstrip("-").replace("_", "-")
