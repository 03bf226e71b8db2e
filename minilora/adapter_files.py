"""What lies in an adapter folder, read strictly: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``. No model is needed.

Every tensor's name is ``base_model.model.`` + the path of the slot + what the variant calls it (``lora_A.weight``); the adapter's
own name is not in the file. A file is data: it names layers exactly, it never brings a regular expression, an import or code.
Next file: ``save.py``.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minilora.config import LoraConfig
from minilora.errors import CheckpointError
from minilora.io import read_bytes

__all__ = ["CONFIG_FILE", "PREFIX", "WEIGHTS_FILE", "Stored", "read_adapter", "refuse_regexes"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
VARIANT = "minilora_variant"  # in the metadata of the weights file
PLAIN = re.compile(r"[A-Za-z0-9_.-]+")  # a module's name, which means the same as a regular expression and without one


@dataclass(frozen=True)
class Stored:
    """An adapter folder as read: nothing is compared with a model yet.

    Attributes:
        config: of the adapter. tensors: under the file's names. variant: the registered variant's name. path: of the weights file.
        from_file: whether the config is the file's, and not the caller's.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    variant: str
    path: Path
    from_file: bool = True


def read_adapter(folder: str | os.PathLike[str], config: LoraConfig | None = None) -> Stored:
    """Config and tensors of an adapter folder; ``config`` is used instead of the file's.

    Raises:
        CheckpointError: a file is missing, damaged, or holds what no adapter holds; the message names it. ConfigError: likewise a field.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; wanted one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    used = config or LoraConfig.from_pretrained(place)
    tensors, metadata = _read_tensors(place / WEIGHTS_FILE)
    return Stored(used, tensors, metadata.get(VARIANT, used.variant), place / WEIGHTS_FILE, config is None)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise CheckpointError(
            f"{pickled}: a pickle file can run code and is never read; load it in PEFT and save_pretrained it again"
        )
    raw = read_bytes(path, "the adapter's weights")
    try:
        tensors = safetensors.torch.load(raw)
        metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file of {len(raw)} bytes ({error}); copy or save it again"
        ) from None
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor; save the adapter again")
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{path}: tensor {key!r} does not start with {PREFIX!r}; is this an adapter of PEFT's layout?"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {key} holds NaN or infinity; the run that saved it had diverged")
    return tensors, metadata


def refuse_regexes(stored: Stored) -> None:
    """Raise ``CheckpointError`` for a pattern of ranks or alphas in a file that is more than a module's name."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(stored.config, field):
            if stored.from_file and not PLAIN.fullmatch(key):
                raise CheckpointError(
                    f"{stored.path.with_name(CONFIG_FILE)}: {field} key {key!r} is a regular expression, and none is run from a file; "
                    "write module names, or pass config=LoraConfig(...)"
                )
