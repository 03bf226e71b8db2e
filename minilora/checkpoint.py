"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``, read strictly, written atomically.

Every tensor's name is ``base_model.model.`` + the path of the slot + what the variant calls it (``lora_A.weight``); the adapter's
own name is not in the file. A file is data: it names layers exactly, it never brings a regular expression, an import or code.
Nothing of the model changes before everything in the folder has been checked against it. Next file: ``peft_model.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.adapter import Adapter
from minilora.config import LoraConfig
from minilora.errors import CheckpointError, StateError
from minilora.inject import ALL_LINEAR, build, default_targets, place
from minilora.io import read_bytes, write_files
from minilora.layers import is_conv1d
from minilora.slots import Value, adapters_of, own_parameters
from minilora.targets import ends_with

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "adapter_state_dict",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "saved_config",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHOWN = 3  # names in a message


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter under the names that its file has; they share memory with the model."""
    return _tensors_of(adapters_of(model).named(adapter_name))


def _tensors_of(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """File name to tensor of all that an adapter keeps in its slots."""
    tensors: dict[str, Tensor] = {}
    for path, value in values.items():
        if isinstance(value, Adapter):
            own = {f"{path}.{file}": getattr(value, name) for name, file in value.file_names.items()}
        elif isinstance(value, nn.Parameter):
            owner, _, attr = path.rpartition(".")
            inner = ".base_layer" if isinstance(values.get(owner), Adapter) else ""
            own = {f"{owner}{inner}.{attr}": value}
        else:
            own = {f"{path}.{name}": tensor for name, tensor in value.state_dict().items()}
        tensors.update({_PREFIX + name: tensor.detach() for name, tensor in own.items()})
    return tensors


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write one adapter as PEFT would, so that PEFT, vLLM and llama.cpp's converter read it.

    Raises:
        StateError: there is no such adapter, or a tensor of it is not finite. CheckpointError: the folder cannot be written.
    """
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter_state_dict(model, adapter_name).items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(
                f"adapter {adapter_name!r} holds NaN or infinity in {key}; the training run diverged, save an earlier step"
            )
    content = saved_config(model, adapter_name)
    write_files(
        folder,
        {
            WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
            CONFIG_FILE: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(),
        },
    )


def saved_config(model: nn.Module, adapter_name: str = "default") -> dict:
    """The content of ``adapter_config.json``: the user's config with what the model decided (targets, orientation, base name)."""
    adapters = adapters_of(model)
    adapters.check([adapter_name])
    config = adapters.configs[adapter_name]
    content = config.to_dict()
    paths = [path for path, slot in adapters.slots.items() if isinstance(slot.kept.get(adapter_name), Adapter)]
    with adapters.bare():
        content["target_modules"] = _named_targets(model, config, paths)
        content["fan_in_fan_out"] = any(is_conv1d(model.get_submodule(path)) for path in paths)
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    content["base_model_name_or_path"] = config.base_model_name_or_path or base or None
    return content


def _named_targets(model: nn.Module, config: LoraConfig, paths: list[str]) -> list[str] | str:
    """Target names that stand for exactly these layers of this model: the user's own, or the shortest list that says the same."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() != ALL_LINEAR:
        return wanted
    if wanted is None and isinstance(default := default_targets(model), str):
        return default
    if wanted is not None and not isinstance(wanted, str):
        return sorted(wanted)
    endings = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = [path for path, _ in model.named_modules() if any(ends_with(path, ending) for ending in endings)]
    return endings if set(meant) == set(paths) else sorted(paths)


def read_adapter(folder: str | os.PathLike[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of an adapter folder, under the file's names; nothing is compared with a model yet.

    Raises:
        CheckpointError: a file is missing, damaged, or holds what no adapter holds; the message names it. ConfigError: likewise a field.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; wanted one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    source = place / CONFIG_FILE
    raw = read_bytes(source, "the adapter's config")
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{source}: not JSON ({error}); save the adapter again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: holds a {type(content).__name__}; wanted an object of config fields")
    return LoraConfig.from_dict(content, str(source)), _read_tensors(place / WEIGHTS_FILE)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise CheckpointError(
            f"{pickled}: a pickle file can run code and is never read; load it in PEFT and save_pretrained it again"
        )
    raw = read_bytes(path, "the adapter's weights")
    try:
        tensors = safetensors.torch.load(raw)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file of {len(raw)} bytes ({error}); copy or save it again"
        ) from None
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor; save the adapter again")
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise CheckpointError(
                f"{path}: tensor {key!r} does not start with {_PREFIX!r}; is this an adapter of PEFT's layout?"
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{path}: {key} is {tensor.dtype}; wanted float32, float16 or bfloat16")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {key} holds NaN or infinity; the run that saved it had diverged")
    return tensors


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Inject the adapter of a folder and make it the active one, frozen unless ``is_trainable``.

    Raises:
        CheckpointError: file and model, or file and config, disagree: missing, unexpected or mis-shaped tensors, each by name. ConfigError,
            TargetError, StateError: as ``read_adapter`` and ``inject``. The model is then as it was.
    """
    config, tensors = read_adapter(folder)
    values = build(model, _exact(config, tensors), adapter_name)
    _copy_into(_tensors_of(values), tensors, Path(folder) / WEIGHTS_FILE)
    place(model, config, adapter_name, values)
    if not is_trainable:
        for value in values.values():
            for parameter in own_parameters(value):
                parameter.requires_grad_(False)
    return model


def _exact(config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The config with a regular expression (which a file must not bring) replaced by the layers that the file has tensors for."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() == ALL_LINEAR:
        return config
    paths = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    return dataclasses.replace(config, target_modules=tuple(paths))


def _copy_into(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    if missing := sorted(own.keys() - tensors.keys()):
        raise CheckpointError(
            f"{where}: {_listed(missing)} missing, which the config asks for on this model; wrong base model or config?"
        )
    if extra := sorted(tensors.keys() - own.keys()):
        raise CheckpointError(
            f"{where}: {_listed(extra)} unexpected on this model; wrong base model, or target_modules too short?"
        )
    for key, tensor in tensors.items():
        found, wanted = list(tensor.shape), list(own[key].shape)
        if found != wanted:
            raise CheckpointError(f"{where}: {key} is {found}, config and model want {wanted}; wrong base model or r")
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more + (" is" if len(listed) == 1 else " are")
