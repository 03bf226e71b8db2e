"""What lies in a folder: an adapter (ours or PEFT's), a run, a checkpoint of one, a packed model, a GGUF file; and what is in it.

Everything is read as strictly as when it is loaded, and no weight of a base model is read. ``look`` returns plain values, which
``minilora info`` prints as tables or as JSON.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError
from minilora.export.servers import servers_of
from minilora.files.parse import parse_json
from minilora.files.read import read_bytes, refuse_path
from minilora.files.tensors import open_tensors
from minilora.gguf.file import SUFFIX, gguf_in
from minilora.hf.known_base import linear_layers, on_disk
from minilora.hf.load import resolve
from minilora.hf.packed import METHOD, is_packed_folder, packing_said
from minilora.job.gguf_info import about_gguf
from minilora.job.record import read_record
from minilora.lora.coverage import called
from minilora.quant.bnb import is_state, storable, weight_of
from minilora.quant.codebooks import codebook
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE, Stored, read_adapter
from minilora.store.contents import Layer, layers_in, others_in
from minilora.training.checkpoint import STATE_FILE, steps
from minilora.training.left import LOG_FILE, kept_records

__all__ = ["look"]


def look(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the folder, or a model of this name, is (``kind``), and everything that is known of it, as JSON values.

    Raises:
        MissingPackageError: "smollm2" is named, and its package is not installed.
        CheckpointError: it is no folder of these kinds, or a file in it is damaged; the message has what was looked for.
    """
    refuse_path(folder)
    place = _place(folder)
    if not place.is_dir() and place.suffix == SUFFIX:
        return about_gguf(place)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; wanted an adapter, a run, a packed model or a GGUF file")
    if (place / CONFIG_FILE).exists() and _is_mlx(place):
        return {"kind": "adapter for MLX", "folder": str(place), "size": _size(place, "*.safetensors")}
    if (place / CONFIG_FILE).exists() or (place / WEIGHTS_FILE).exists():
        return _adapter(place)
    if (place / LOG_FILE).exists():
        return {"kind": "run that has not ended", "folder": str(place), "run": _run(place), "checkpoints": steps(place)}
    if (place / "config.json").exists():
        return _model(place)
    if file := gguf_in(place):
        return about_gguf(file)
    raise CheckpointError(
        f"{place}: neither an adapter ({CONFIG_FILE}), a run ({LOG_FILE}) nor a model (config.json) lies in it; "
        "wanted the folder of one"
    )


def _place(folder: str | os.PathLike[str]) -> Path:
    """A path; where none is there, what the name of a model stands for: "smollm2", "smollm2.gguf", or one in the Hub's cache."""
    place, name = Path(folder), os.fspath(folder)
    return place if place.exists() else Path(resolve(on_disk(name) or name))


# ---- adapters and runs


def _adapter(place: Path) -> dict[str, Any]:
    stored = read_adapter(place)
    layers, others = layers_in(stored), others_in(stored)
    tensors = stored.tensors.values()
    found: dict[str, Any] = {
        "kind": _kind(place),
        "folder": str(place),
        "base": stored.config.base_model_name_or_path,
        "variant": stored.variant,
        "lora_alpha": stored.config.lora_alpha,
        "rslora": stored.config.use_rslora,
        "layers": _covered(stored, layers),
        "ranks": _counted(layer.r for layer in layers),
        "scalings": _counted(f"{layer.scaling:.6g}" for layer in layers),
        "updates": _updates(layers),
        "untrained": sum(layer.untrained for layer in layers),
        "others": others,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": _counted(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        "size": (place / WEIGHTS_FILE).stat().st_size,
        "seal": "whole" if (place / SEAL_FILE).exists() else "none: made by another program, or taken away",
        "sha256": stored.sha256,
        "servers": [asdict(server) for server in servers_of(stored, place)],
    }
    if found["kind"] == "run":
        found["run"] = _run(place)
    return found


def _kind(place: Path) -> str:
    if (place / LOG_FILE).exists():
        return "run"
    return "checkpoint of a run" if (place / STATE_FILE).exists() else "adapter"


def _covered(stored: Stored, layers: list[Layer]) -> dict[str, Any]:
    """How many layers have an adapter, of how many, and which kinds have none; the latter where the base is on this disk."""
    paths = {layer.path for layer in layers}
    every = linear_layers(stored.config.base_model_name_or_path)
    if every is not None:  # PEFT names the weight of a linear layer too
        paths = {path if path in set(every) else path.removesuffix(".weight") for path in paths}
    if every is None or not paths & set(every):
        return {"covered": len(paths), "of": None, "without": []}
    paths = {path if path in every else f"{path}.weight" for path in paths}  # a router's weight is one of its own there
    rest = [path for path in every if path not in paths]
    names = sorted({called(path) for path in rest})
    return {"covered": len(paths), "of": len(paths) + len(rest), "without": names}


def _updates(layers: list[Layer]) -> list[dict[str, Any]]:
    """A row for each kind of layer: how many, and the norms of their updates (None where the base's weights decide them)."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return [_update(kind, own) for kind, own in kinds.items()]


def _update(kind: str, own: list[Layer]) -> dict[str, Any]:
    norms = [layer.norm for layer in own if layer.norm is not None]
    most = max(own, key=lambda layer: layer.norm or 0.0)
    known = len(norms) == len(own)
    return {
        "kind": kind,
        "layers": len(own),
        "norm": math.sqrt(sum(norm**2 for norm in norms)) if known else None,
        "largest": most.norm if known else None,
        "largest_in": most.path if known else None,
        "untrained": sum(layer.untrained for layer in own),
    }


def _counted(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _run(place: Path) -> dict[str, Any]:
    """Steps and losses that the log tells, and what the run remembers of its base."""
    records = kept_records(place)
    losses = [record["loss"] for record in records if "loss" in record]
    held = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    record = read_record(place)
    remembered = {"model": record.model, "packing": str(record.packing), "system": record.system} if record else {}
    return remembered | {
        "steps": max((record["step"] for record in records), default=0),
        "loss": [losses[0], losses[-1]] if losses else None,
        "held_out_loss": [held[0], held[-1]] if held else None,
        "seconds": max((record["seconds"] for record in records if "seconds" in record), default=None),
    }


def _is_mlx(place: Path) -> bool:
    try:
        return "fine_tune_type" in parse_json(read_bytes(place / CONFIG_FILE, "the adapter's config"))
    except ValueError:
        return False  # its reader says what is wrong


# ---- models


def _model(place: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_bytes(place / "config.json", "the model's config"))
    except ValueError as error:
        raise CheckpointError(f"{place / 'config.json'}: not JSON that a model has ({error}); copy it again") from None
    packed = is_packed_folder(str(place))
    found: dict[str, Any] = {
        "kind": "packed model" if packed else "model",
        "folder": str(place),
        "architecture": next(iter(config.get("architectures") or []), config.get("model_type")),
        "size": _size(place, "*.safetensors"),
    }
    with open_tensors(place) as tensors:
        weights = {weight_of(name) for name in tensors.shapes if is_state(name)}
        rest = [name for name in tensors.shapes if weight_of(name) not in weights]
        found["dtypes"] = _counted(tensors.dtype(name) for name in rest)
        found["dense_parameters"] = sum(math.prod(tensors.shapes[name]) for name in rest)
    if packed:
        packing = packing_said(str(place))
        own = config["quantization_config"]["quant_method"] == METHOD
        why = "the layout is minilora's own; it opens nf4 and fp4"
        if storable(packing.format, packing.blocksize):
            why = "experts are packed, and it opens packed linear layers only"
        found |= {
            "format": codebook(packing.format).name,
            "double_quant": packing.double_quant,
            "packed_layers": len(weights),
        }
        found["servers"] = [
            {"name": "minilora", "takes": "as it is", "why": f"--model {place}"},
            {"name": "transformers", "takes": "no", "why": why}
            if own
            else {"name": "transformers", "takes": "as it is", "why": "with bitsandbytes, whose layout it is"},
            {"name": "llama.cpp", "takes": "no", "why": "it packs weights in its own way, from a dense model"},
        ]
    return found


def _size(place: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in place.glob(pattern))
