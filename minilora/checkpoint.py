"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``, read strictly, written atomically.

Every tensor's name is ``base_model.model.`` + the path of the slot + what the variant calls it (``lora_A.weight``); the adapter's
own name is not in the file. A file is data: it names layers exactly, it never brings a regular expression, an import or code.
Nothing of the model changes before everything in the folder has been checked against it. Next file: ``peft_model.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.adapter import Adapter, variant
from minilora.config import LoraConfig
from minilora.errors import CheckpointError, StateError
from minilora.inject import ALL_LINEAR, build, default_targets, place
from minilora.io import read_bytes, write_files
from minilora.layers import is_conv1d
from minilora.slots import Value, adapters_of, has_adapters, own_parameters
from minilora.targets import ends_with, exactly
from minilora.variants.embedding import LoRAEmbedding

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "adapter_state_dict",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "saved_config",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_VARIANT = "minilora_variant"  # in the metadata of the weights file
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")  # a module's name, which means the same as a regular expression and without one
_SHOWN = 3  # names in a message
_SMALL = 1 << 16  # elements


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter under the names that its file has; they share memory with the model."""
    return _tensors_of(adapters_of(model).named(adapter_name))


def _tensors_of(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """File name to tensor of all that an adapter keeps in its slots."""
    tensors: dict[str, Tensor] = {}
    for path, value in values.items():
        if isinstance(value, Adapter):
            held = {file: getattr(value, name) for name, file in value.file_names.items()}
            own = {f"{path}.{file}": tensor for file, tensor in held.items() if tensor is not None}
        elif isinstance(value, nn.Parameter):
            owner, _, attr = path.rpartition(".")
            inner = ".base_layer" if isinstance(values.get(owner), Adapter) else ""
            own = {f"{owner}{inner}.{attr}": value}
        else:
            own = {f"{path}.{name}": tensor for name, tensor in value.state_dict().items()}
        tensors.update({PREFIX + name: tensor.detach() for name, tensor in own.items()})
    return tensors


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write one adapter as PEFT would, so that PEFT, vLLM and llama.cpp's converter read it.

    Raises:
        StateError: there is no such adapter, or a tensor of it is not finite. CheckpointError: the folder cannot be written.
    """
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter_state_dict(model, adapter_name).items()}
    if (key := _not_finite(tensors)) is not None:
        raise StateError(
            f"adapter {adapter_name!r} holds NaN or infinity in {key}; the training run diverged, save an earlier step"
        )
    content = saved_config(model, adapter_name)
    write_files(
        folder,
        {
            WEIGHTS_FILE: safetensors.torch.save(tensors, metadata=_metadata(model, adapter_name)),
            CONFIG_FILE: f"{json.dumps(content, indent=2)}\n".encode(),  # unsorted: the first pattern that matches wins
        },
    )


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity; small ones are looked at together, one by one only if there is something to find."""
    small = [tensor.reshape(-1) for tensor in tensors.values() if tensor.numel() <= _SMALL]
    if small and not bool(torch.isfinite(torch.cat(small)).all()):
        return next(key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    large = (key for key, tensor in tensors.items() if tensor.numel() > _SMALL)
    return next((key for key in large if not bool(torch.isfinite(tensors[key]).all())), None)


def _metadata(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """What PEFT writes, and the variant where the config alone does not say it (PEFT's config has no field for it)."""
    adapters = adapters_of(model)
    kind = adapters.variants[adapter_name]
    return {"format": "pt"} | ({} if kind == adapters.configs[adapter_name].variant else {_VARIANT: kind})


def saved_config(model: nn.Module, adapter_name: str = "default") -> dict:
    """The content of ``adapter_config.json``: the user's config with what the model decided (targets, orientation, base name)."""
    adapters = adapters_of(model)
    adapters.check([adapter_name])
    config = adapters.configs[adapter_name]
    content = config.to_dict()
    paths = [
        path
        for path, slot in adapters.slots.items()
        if isinstance(value := slot.kept.get(adapter_name), Adapter) and value.targeted
    ]
    with adapters.bare():
        content["target_modules"] = _named_targets(model, config, paths)
        content["fan_in_fan_out"] = any(is_conv1d(model.get_submodule(path)) for path in paths)
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    for field, own in (("rank_pattern", 0), ("alpha_pattern", 1)):
        if not all(map(_PLAIN.fullmatch, content[field])):  # no regex is run from a file: say what it came to
            each = {path: config.for_module(path)[own] for path in paths}
            content[field] = {
                path: value for path, value in each.items() if value != (config.r, config.lora_alpha)[own]
            }
    if config.task_type is None:  # PEFT's AutoPeftModel finds the model's class by this
        content["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
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
    if set(meant) == set(paths):
        return endings
    chosen = exactly(paths, [path for path, _ in model.named_modules() if path])
    return chosen if isinstance(chosen, str) else list(chosen)


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


@dataclass(frozen=True)
class LoadReport:
    """What loading left out; all empty unless ``strict=False``. Lists of tensor names as in the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]


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
    return Stored(used, tensors, metadata.get(_VARIANT, used.variant), place / WEIGHTS_FILE, config is None)


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
    for key in tensors:
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{path}: tensor {key!r} does not start with {PREFIX!r}; is this an adapter of PEFT's layout?"
            )
    if (bad := _not_finite(tensors)) is not None:
        raise CheckpointError(f"{path}: {bad} holds NaN or infinity; the run that saved it had diverged")
    return tensors, metadata


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    strict: bool = True,
    activate: bool = True,
    config: LoraConfig | None = None,
) -> LoadReport:
    """Inject the adapter of a folder.

    Args:
        is_trainable: False freezes it.
        strict: False loads what fits and reports the rest.
        activate: make it the active adapter.
        config: use this one and not the file's.

    Returns:
        What was left out (nothing when strict).

    Raises:
        CheckpointError: file and model, or file and config, disagree: missing, unexpected or mis-shaped tensors, each by name.
        ConfigError, TargetError, StateError: as ``read_adapter`` and ``inject``. The model is then as it was.
    """
    stored = read_adapter(folder, config)
    values, report = load_values(model, stored, adapter_name, strict)
    place(model, stored.config, adapter_name, values, stored.variant, activate)
    if not is_trainable:
        for value in values.values():
            for parameter in own_parameters(value):
                parameter.requires_grad_(False)
    return report


def restore_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Copy a folder's tensors into an adapter that the model has already: resuming, not adding. What trains does not change.

    Raises:
        CheckpointError: as ``load_adapter``; the adapter is then as it was.
    """
    stored, adapters = read_adapter(folder), adapters_of(model)
    own, kind = adapters.configs.get(adapter_name), adapters.variants.get(adapter_name)
    for path, value in adapters.named(adapter_name).items():
        if own is not None and isinstance(value, Adapter):
            found, wanted = ((*config.for_module(path), config.use_rslora) for config in (stored.config, own))
            if found != wanted or stored.variant != kind:
                said = f"(r, lora_alpha, rslora) = {found} as {stored.variant}, the adapter {wanted} as {kind}"
                raise CheckpointError(
                    f"{stored.path}: {path} has {said}; resume with the config that it was saved with"
                )
    _fill(model, adapters.named(adapter_name), stored, strict=True)


def fill_adapter(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default", strict: bool = True
) -> LoadReport:
    """Copy tensors, named as in a file, into an adapter that the model has already. Raises as ``load_adapter``; all or nothing."""
    adapters = adapters_of(model)
    values = adapters.named(adapter_name)
    stored = Stored(adapters.configs[adapter_name], dict(tensors), adapters.variants[adapter_name], Path("state dict"))
    return _fill(model, values, stored, strict)


def load_values(
    model: nn.Module, stored: Stored, adapter_name: str, strict: bool = True
) -> tuple[dict[str, Value], LoadReport]:
    """What a stored adapter puts into each slot, without touching the model, and what was left out. Raises as ``load_adapter``."""
    values = build(model, _exact(stored), adapter_name, stored.variant)
    return values, _fill(model, values, stored, strict)


def refuse_regexes(stored: Stored) -> None:
    """Raise ``CheckpointError`` for a pattern of ranks or alphas in a file that is more than a module's name."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(stored.config, field):
            if stored.from_file and not _PLAIN.fullmatch(key):
                raise CheckpointError(
                    f"{stored.path.with_name(CONFIG_FILE)}: {field} key {key!r} is a regular expression, and none is run from a file; "
                    "write module names, or pass config=LoraConfig(...)"
                )


def _exact(stored: Stored) -> LoraConfig:
    """The config without regular expressions of the file: targets become the layers that have tensors in it."""
    refuse_regexes(stored)
    config = stored.config
    names = [name for name in (config.target_modules, config.exclude_modules) if isinstance(name, str)]
    if not stored.from_file or all(name.lower() == ALL_LINEAR for name in names):
        return config
    files = [f".{name}" for kind in (variant(stored.variant), LoRAEmbedding) for name in kind.file_names.values()]
    keys = [key.removeprefix(PREFIX) for key in stored.tensors]
    paths = {key.removesuffix(file) for key in keys for file in files if key.endswith(file)}
    return dataclasses.replace(
        config,
        target_modules="|".join(map(re.escape, sorted(paths))),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _fill(model: nn.Module, values: Mapping[str, Value], stored: Stored, strict: bool) -> LoadReport:
    """Copy the file's tensors into new adapters after comparing every name and shape."""
    own = _tensors_of(values)
    tensors = {key: tensor for key, tensor in stored.tensors.items() if not _is_base_weight(model, key, tensor)}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
    if strict and missing:
        raise CheckpointError(
            f"{stored.path}: {_listed(missing)} missing, which the config asks for on this model; wrong base model or config?"
        )
    if strict and extra:
        raise CheckpointError(
            f"{stored.path}: {_listed(extra)} unexpected on this model; wrong base model, or target_modules too short?"
        )
    if strict and wrong:
        found, wanted = list(tensors[wrong[0]].shape), list(own[wrong[0]].shape)
        raise CheckpointError(
            f"{stored.path}: {wrong[0]} is {found}, config and model want {wanted}; wrong base model or r"
        )
    for key in sorted(own.keys() & tensors.keys()):
        kind = tensors[key].dtype
        if kind != own[key].dtype and kind not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{stored.path}: {key} is {kind}; wanted float32, float16 or bfloat16")
    fitting = sorted(own.keys() & tensors.keys() - set(wrong))
    _refuse_unequal_twins(own, tensors, fitting, stored.path)
    for key in fitting:
        own[key].copy_(tensors[key])
    return LoadReport(missing, extra, wrong)


def _refuse_unequal_twins(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], keys: list[str], path: Path
) -> None:
    """Two names of one tied tensor must bring the same values (a head sees the embedding's factor turned round)."""
    if (bad := _not_finite({key: tensors[key] for key in keys})) is not None:
        raise CheckpointError(f"{path}: {bad} holds NaN or infinity; the run that saved it had diverged")
    first: dict[int, str] = {}
    for key in keys:
        twin = first.setdefault(own[key].data_ptr(), key)
        turned = tensors[key].T if own[key].dim() == 2 and own[key].stride() != own[twin].stride() else tensors[key]
        if twin != key and own[key].numel() == own[twin].numel() and not torch.equal(tensors[twin], turned):
            raise CheckpointError(
                f"{path}: {key} differs from the embedding that this head is tied to; untie the model first"
            )


def _is_base_weight(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether this is the unchanged weight of an adapted embedding, which PEFT saves along: it must be the model's own."""
    path, _, name = key.removeprefix(PREFIX).rpartition(".base_layer.")
    if name != "weight":
        return False
    with adapters_of(model).bare() if has_adapters(model) else nullcontext():
        own = dict(model.named_parameters(remove_duplicate=False)).get(f"{path}.weight")
    if own is None or own.shape != tensor.shape or not torch.equal(own.detach().cpu(), tensor.to(own.dtype)):
        raise CheckpointError(
            f"{key}: the file brings another base weight than the model has; load that base model, or resize this one"
        )
    return True


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more + (" is" if len(listed) == 1 else " are")
