"""Which kind of adapter lies at a path, told by names and headers alone; what is none is refused with what it is instead.

PEFT's layout is what minilora, unsloth, axolotl and most others write; mlx-lm, diffusers and kohya's scripts have their own. Nothing is
unpickled, nothing that a file says is run. Next file: ``doctor/case.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError
from minilora.files import disk
from minilora.files.parse import LONGEST_JSON, parse_json
from minilora.files.read import current, refuse_path
from minilora.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE

__all__ = ["DIFFUSERS_FILE", "GGUF", "MLX", "MLX_FILE", "PEFT", "SINGLE", "Place", "find", "read_json", "small_file"]

PEFT, MLX, SINGLE, GGUF = "PEFT", "MLX", "one file", "GGUF"
MLX_FILE, DIFFUSERS_FILE = "adapters.safetensors", "pytorch_lora_weights.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_NAMES = 100_000


@dataclass(frozen=True)
class Place:
    """Where an adapter lies: ``folder``, the ``names`` in it, the ``kind``, and the file with its ``weights``."""

    folder: Path
    names: tuple[str, ...]
    kind: str
    weights: Path


def find(path: Path) -> Place:
    """The adapter at a path: its folder, or one of its files.

    Raises:
        CheckpointError: there is none, or nothing of it may be read; the message says what lies there instead.
    """
    refuse_path(path)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder or file; wanted an adapter's")
    names = _names(path)
    for name, kind in ((WEIGHTS_FILE, PEFT), (MLX_FILE, MLX), (DIFFUSERS_FILE, SINGLE)):
        if name in names and (kind != PEFT or CONFIG_FILE in names):
            return Place(path, names, kind, current(path, [name])[name])
    single = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if len(single) == 1 and not {CONFIG_FILE, WEIGHTS_FILE, "config.json"} & set(names):
        return _of_file(path / single[0])
    raise CheckpointError(f"{path}: {next(filter(None, (said(path, names) for said in _INSTEAD)))}")


def _names(folder: Path) -> tuple[str, ...]:
    try:
        names = disk.used.names(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked into ({error.strerror}); check its rights") from None
    if len(names) > _MOST_NAMES:
        raise CheckpointError(
            f"{folder}: {len(names):,} files; at most {_MOST_NAMES:,} are looked at in an adapter's folder"
        )
    return tuple(names)


def _of_file(path: Path) -> Place:
    if path.name in (WEIGHTS_FILE, CONFIG_FILE, MLX_FILE):
        return find(path.parent)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path}: a pickle file can run code and is never read; load it where it was made, and save it as safetensors"
        )
    names = (path.name,)
    if path.suffix == ".safetensors":
        return Place(path.parent, names, SINGLE, path)
    if bytes(small_file(path, 4) or b"") == b"GGUF":
        return Place(path.parent, names, GGUF, path)
    raise CheckpointError(f"{path}: no adapter; wanted a folder with {CONFIG_FILE}, a .safetensors or a .gguf file")


# ---- what lies there instead of an adapter: each says it, or nothing


def _pickled(path: Path, names: tuple[str, ...]) -> str:
    if "adapter_model.bin" not in names or WEIGHTS_FILE in names:
        return ""
    return (
        "adapter_model.bin is a pickle file, which can run code and is never read; load it in PEFT, where you trust it, and "
        "save_pretrained it again"
    )


def _weights_alone(path: Path, names: tuple[str, ...]) -> str:
    if WEIGHTS_FILE not in names:
        return ""
    return (
        f"{CONFIG_FILE} is missing, and {WEIGHTS_FILE} alone says neither scale nor layers; copy the config from the run, or from another "
        "of its checkpoints"
    )


def _config_alone(path: Path, names: tuple[str, ...]) -> str:
    if CONFIG_FILE not in names:
        return ""
    left = _sharded(path, names)
    return f"{CONFIG_FILE} without {WEIGHTS_FILE}: {left or 'the weights were not saved, or not copied; copy the folder again'}"


def _sharded(path: Path, names: tuple[str, ...]) -> str:
    if any(re.fullmatch(r"global_step\d+", name) for name in names) or "zero_to_fp32.py" in names:
        return (
            "only the shards of a DeepSpeed run lie there; gather them where the run was (save_pretrained within "
            "deepspeed.zero.GatheredParameters, or its zero_to_fp32.py)"
        )
    if any(name.startswith("pytorch_model_fsdp") or name.endswith(".distcp") for name in names):
        return "only the shards of an FSDP run lie there; join them with accelerate merge-weights, and save the adapter from it"
    return ""


def _whole_model(path: Path, names: tuple[str, ...]) -> str:
    weights = [name for name in names if re.match(r"(pytorch_)?model.*\.(safetensors|bin)$", name)]
    if "config.json" not in names or not weights:
        return ""
    return f"a whole model ({weights[0]}), merged or trained in full, and no adapter; it is served as it is, or see minilora info {path}"


def _below(path: Path, names: tuple[str, ...]) -> str:
    """A run's folder, or the folder of adapters by name."""
    below = [name for name in names if _is_file(path / name / CONFIG_FILE)]
    if not below:
        return ""
    return f"no adapter in it, and one in each of {', '.join(below[-3:])}; name one of them, such as {path / below[-1]}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that nobody may look into
        return False


def _nothing(path: Path, names: tuple[str, ...]) -> str:
    return f"no adapter: wanted {CONFIG_FILE} and {WEIGHTS_FILE}, or one file of an adapter"


_INSTEAD: tuple[Callable[[Path, tuple[str, ...]], str], ...] = (
    _pickled,
    _weights_alone,
    _config_alone,
    _sharded,
    _below,
    _whole_model,
    _nothing,
)


# ---- small files


def small_file(path: Path, most: int = LONGEST_JSON) -> bytearray | None:
    """The file, of one that is longer than ``LONGEST_JSON`` or ``most`` its beginning; None if it is not there.

    Raises:
        CheckpointError: it is no file, or may not be read.
    """
    try:
        with closing(disk.used.open(path)) as file:
            return file.read(0, min(file.size, most))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object, None if there is no such file. Raises ``CheckpointError`` for one that is none, or too long."""
    raw = small_file(path, LONGEST_JSON + 1)
    try:
        return None if raw is None else parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON that can be used ({error}); copy the file again") from None
