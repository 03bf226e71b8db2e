"""A folder of model files that is there whole or not at all: transformers writes into a staging folder, ``io`` flushes and renames it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minilora.errors import CheckpointError, MiniLoraError, MissingPackageError, WriteError
from minilora.files.parse import parse_json
from minilora.files.read import read_bytes, refuse_path
from minilora.files.write import new_folder
from minilora.training.memory import is_out_of_memory

_MOST_LAYERS = 4096  # ten times the deepest that is known

__all__ = [
    "import_transformers",
    "in_new_folder",
    "read_config",
    "refuse_endless",
    "refuse_occupied",
    "refuse_odd_files",
    "refuse_pickles",
    "unreadable",
]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def import_transformers() -> Any:
    """The library. Raises ``MissingPackageError`` with the install command."""
    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            "loading a language model needs transformers; run 'pip install minilora[hf]'"
        ) from None
    return transformers


def refuse_occupied(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path. Raises ``CheckpointError`` if something is in it already, before any work is done."""
    target = Path(folder)
    refuse_path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not an empty folder; choose another --out, or remove it")
    return target


def in_new_folder(target: Path, write: Callable[[Path], Any]) -> Path:
    """``write`` fills a staging folder, which then becomes ``target``. Raises ``WriteError``; nothing is left then."""
    try:
        return new_folder(target, write)
    except SafetensorError as error:  # its writer wraps what the system says
        raise WriteError(f"{target}: cannot be written ({error}); choose a writable folder with room") from None


def unreadable(name: str, error: Exception) -> Exception:
    """What to raise for what transformers raised while it read model ``name``: of damaged files anything can come.

    A missing package and a want of memory are not the folder's fault, and are returned as they are.
    """
    if isinstance(error, (MiniLoraError, ImportError)) or is_out_of_memory(error):
        return error
    reason = next(iter(str(error).strip().splitlines()), "")
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"model {name!r}: comes with Python code of its own, which is not run; look at it, and if you trust it, give "
            "--trust-remote-code (trust_remote_code=True)"
        )
    if "ignore_mismatched_sizes" in reason:  # its report goes to a log that nobody may see
        reason = "its weights have other shapes than its config.json says"
    kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
    return CheckpointError(
        f"model {name!r}: {kind}{reason} (wanted a hub id, a folder saved by transformers, a GGUF file, or 'smollm2')"
    )


def refuse_odd_files(name: str, place: str) -> None:
    """Raise ``CheckpointError`` for a local folder with a pipe or device in it, or whose index names weights outside of it.

    transformers would wait for a pipe, read a device for ever, and open whatever path an index names.
    """
    folder = Path(place)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"model {name!r}: {path.name} in it is a pipe or a device; wanted files")
    for path in sorted(folder.glob("*.index.json")):
        try:
            named = set(parse_json(read_bytes(path, "the index of the weights"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"model {name!r}: {path.name} is no index of weights ({error}); copy it again"
            ) from None
        if far := [file for file in named if not isinstance(file, str) or not file or Path(file).name != file]:
            raise CheckpointError(
                f"model {name!r}: {path.name} names {str(far[0])[:200]!r}; wanted files of the folder"
            )


def refuse_pickles(name: str, place: str) -> None:
    """Raise ``CheckpointError`` for a local folder whose weights are pickles alone: a pickle can run code, and none is read."""
    folder = Path(place)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if found := sorted(path.name for kind in _PICKLES for path in folder.glob(kind)):
        raise CheckpointError(
            f"model {name!r}: its weights are a pickle ({found[0]}), which can run code and is never read; where you trust it, load it "
            "with transformers and save_pretrained it again, as safetensors"
        )


def read_config(place: str, name: str, trust_remote_code: bool = False) -> Any:
    """The config of the model in ``place``, a folder or hub id, without what it says of quantization; ``name`` is what messages call it.

    Raises:
        CheckpointError: there is none, transformers does not know it, or it asks for code of a hub or for a model without end.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unreadable(name, error) from None
    config.__dict__.pop("quantization_config", None)
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    refuse_endless(parts, name)
    if not trust_remote_code:
        _refuse_kernels(parts, name)
    return config


def _refuse_kernels(parts: list[Any], name: str) -> None:
    """An attention called ``owner/name`` is a program that transformers fetches from a hub, and runs; a config alone may not ask for it."""
    for part in parts:
        for key, value in vars(part).items():
            if "implementation" in key and isinstance(value, str) and "/" in value:
                raise CheckpointError(
                    f"model {name!r}: {key}={value[:100]!r} in its config is code of a hub, which is not run; if you trust it, give "
                    "--trust-remote-code (trust_remote_code=True)"
                )


def refuse_endless(parts: list[Any], name: str) -> None:
    """A model is built layer by layer, so a number alone could keep us busy for hours."""
    for part in parts:
        for key, value in vars(part).items():
            if "layers" in key and isinstance(value, int) and value > _MOST_LAYERS:
                raise CheckpointError(
                    f"model {name!r}: {key}={value:,} in its config; at most {_MOST_LAYERS:,} are built"
                )
