"""Fold an adapter into its base model and save the result as an ordinary transformers folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from minilora.errors import CheckpointError
from minilora.hf.load import load_model, load_tokenizer
from minilora.peft_model import PeftModel

__all__ = ["merge_to_folder", "save_model"]


def merge_to_folder(model: str, adapter: str, out: str, dtype: torch.dtype = torch.float32) -> Path:
    """Load ``model`` dense, merge the adapter folder into it in fp32, and save weights and tokenizer to ``out``.

    Raises:
        CheckpointError: ``out`` exists and is not empty, or adapter and model do not fit; nothing is written then.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not an empty folder; choose another --out, or remove it")
    merged = PeftModel.from_pretrained(load_model(model, dtype), adapter).merge_and_unload()
    return save_model(merged, load_tokenizer(model), target)


def save_model(model: Any, tokenizer: Any, target: Path) -> Path:
    """Save to a temporary folder beside ``target`` and rename it: the folder is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
