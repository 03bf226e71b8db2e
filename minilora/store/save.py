"""An adapter of a model as the files that PEFT would write: its tensors, and its config with what the model decided.

Next file: ``store/load.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.errors import StateError, warn
from minilora.files import validate
from minilora.files.parse import tensor_bytes
from minilora.files.write import write_files
from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import is_conv1d
from minilora.lora import config_file
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Around, Bare
from minilora.lora.config import LoraConfig
from minilora.lora.match import ALL_LINEAR, default_targets
from minilora.lora.slot import Value
from minilora.lora.slots import adapters_of, unwrapped
from minilora.lora.targets import ends_with, exactly, short_names
from minilora.lora.variants.tokens import TiedRows, TokenRows
from minilora.lora.vera_config import VeraConfig
from minilora.store.adapter_files import (
    CONFIG_FILE,
    MADE_WITH,
    PREFIX,
    PROJECTIONS,
    VARIANT,
    WEIGHTS_FILE,
    adapter_sha256,
    not_finite,
    seal,
)
from minilora.store.fingerprint import brought_by, fingerprint
from minilora.store.old_experts import lost_in_peft
from minilora.store.projections import projections_in
from minilora.store.tables import saved_tables, table_of

__all__ = [
    "adapter_files",
    "adapter_state_dict",
    "file_base",
    "file_key",
    "laid_out",
    "save_adapter",
    "saved_config",
    "tensors_of",
]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter under the names that its file has; they share memory with the model, and are laid out as there."""
    return tensors_of(adapters_of(model).named(adapter_name))


def tensors_of(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """File name to tensor of all that an adapter keeps in its slots."""
    tensors: dict[str, Tensor] = {}
    for path, value in values.items():
        if isinstance(value, Adapter):
            held = {name: getattr(value, name) for name in value.file_names}
            own = {file_key(path, value, name): tensor for name, tensor in held.items() if tensor is not None}
        elif isinstance(value, nn.Parameter):
            owner, _, attr = path.rpartition(".")
            inner = ".base_layer" if isinstance(values.get(owner), Adapter) else ""
            own = {_in_file(f"{owner}{inner}.{attr}"): value}
        else:
            own = {_in_file(f"{path}.{name}"): tensor for name, tensor in value.state_dict().items()}
        tensors.update({key: tensor.detach() for key, tensor in own.items()})
    return tensors


def laid_out(values: Mapping[str, Value], tensors: Mapping[str, Tensor], to_file: bool) -> dict[str, Tensor]:
    """``tensors_of`` these values as a file has them (``to_file``), or a file's tensors as ``tensors_of`` has them, without the matrices
    that layers share (``store/projections.py``).
    """
    laid = {key: tensor for key, tensor in tensors.items() if to_file or key not in PROJECTIONS}
    for path, value in values.items():
        if not isinstance(value, Adapter):
            continue
        for name in value.file_names:
            if (tensor := laid.get(key := file_key(path, value, name))) is not None:
                laid[key] = value.to_file(name, tensor) if to_file else value.from_file(name, tensor)
    return laid


def file_key(path: str, adapter: Adapter, name: str) -> str:
    """What a file calls one of the tensors of an adapter."""
    return _in_file(f"{adapter.file_path(path)}.{adapter.file_names[name]}")


def _in_file(name: str) -> str:
    """A part that ``torch.compile`` wrapped is found at another path and is called the same in a file."""
    return PREFIX + name.replace("._orig_mod", "")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
) -> str:
    """Write one adapter as PEFT would, so that PEFT, vLLM and llama.cpp's converter read it; a seal beside finds damage.

    Args:
        save_embedding_layers: whether the base's embedding tables are in the file; "auto" where an embedding is adapted or the
            vocabulary was resized (``store/tables.py``).

    Returns:
        The adapter's digest, for ``load_adapter(..., expect_sha256=)``.

    Raises:
        StateError: there is no such adapter, or a tensor of it is not finite. CheckpointError: the folder cannot be written.
    """
    files = adapter_files(model, adapter_name, save_embedding_layers)
    write_files(folder, files)
    return adapter_sha256(files)


def adapter_files(
    model: nn.Module,
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
    base_config: Path | None = None,
    base: Mapping[str, Any] | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, bytes]:
    """The sealed files of one adapter, by name. Arguments and errors as ``save_adapter``; ``base_config`` as ``saved_tables``;
    ``base`` is what ``file_base`` said while the model was whole, where it lies in shards now; ``given`` are tensors by their names in the
    file, which are written instead of the model's.
    """
    tables = saved_tables(model, adapter_name, save_embedding_layers, base_config)
    values = adapters_of(model).named(adapter_name)
    held = laid_out(values, tensors_of(values), True) | tables | projections_in(values)
    for name, tensor in (given or {}).items():
        if tensor.shape != held[name].shape:
            found, wanted = list(tensor.shape), list(held[name].shape)
            raise StateError(f"state_dict: {name} is {found}, the adapter's is {wanted}; give this model's")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in (held | dict(given or {})).items()}
    if (key := not_finite(tensors)) is not None:
        raise StateError(
            f"adapter {adapter_name!r} holds NaN or infinity in {key}; the training run diverged, save an earlier step"
        )
    content, base = saved_config(model, adapter_name), base or base_of(model, adapter_name, tables)
    config = adapters_of(model).configs[adapter_name]
    layers = {path: value for path, value in values.items() if isinstance(value, Adapter) and value.on == "linear"}
    linear = [path for path, value in layers.items() if not _by_parameter(path, value, config)]
    if said := lost_in_peft(getattr(Bare(model).config, "model_type", None), content["target_modules"], linear):
        warn(said)
    files = {
        WEIGHTS_FILE: tensor_bytes(tensors, _metadata(model, adapter_name)),
        CONFIG_FILE: f"{json.dumps(content, indent=2)}\n".encode(),  # unsorted: the first pattern that matches wins
    }
    return seal(files, base)


def file_base(model: nn.Module, adapter_name: str = "default", around: Around = nullcontext) -> dict[str, Any]:
    """What the file of an adapter would remember of the model under it, as the model is now; ``around`` as in ``fingerprint``."""
    return base_of(model, adapter_name, saved_tables(model, adapter_name), around)


def base_of(
    model: nn.Module, adapter_name: str = "default", tables: Collection[str] = (), around: Around = nullcontext
) -> dict[str, Any]:
    """What an adapter's file remembers of the model under it (``fingerprint``), without the ``tables`` that it brings."""
    values = adapters_of(model).named(adapter_name)
    rows = (TokenRows, TiedRows)  # these bring a part of the table that they are around
    names = {f"{table_of(key)}.weight" for key in tables}
    paths = [
        path
        for path, value in values.items()
        if isinstance(value, Adapter) and not isinstance(value, rows) and f"{path}.weight" not in names
    ]
    return fingerprint(model, paths, brought_by(values) | dict.fromkeys(names), around)


def _metadata(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """What PEFT writes, and the variant where the config alone does not say it (PEFT's config has no field for it)."""
    adapters = adapters_of(model)
    kind = adapters.variants[adapter_name]
    known = {} if kind == adapters.configs[adapter_name].variant else {VARIANT: kind}
    made_with = made_with_of(adapters.named(adapter_name))
    return {"format": "pt"} | known | ({MADE_WITH: made_with} if made_with else {})


def made_with_of(values: Mapping[str, Value]) -> str:
    """One digest for ``made_with`` of all layers; "" if none has any."""
    each = [
        f"{path}:{value.made_with}"
        for path, value in sorted(values.items())
        if isinstance(value, Adapter) and value.made_with
    ]
    return hashlib.sha256("\n".join(each).encode()).hexdigest() if each else ""


def saved_config(model: nn.Module, adapter_name: str = "default") -> dict:
    """The content of ``adapter_config.json``: the user's config with what the model decided (targets, orientation, base name)."""
    adapters, model = adapters_of(model), unwrapped(model)
    adapters.check([adapter_name])
    config = adapters.configs[adapter_name]
    content = config_file.content_of({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    held = adapters.named(adapter_name)
    targeted = {path: value for path, value in held.items() if isinstance(value, Adapter) and value.targeted}
    paths, bare = list(targeted), Bare(model)
    read = {path: value for path, value in targeted.items() if _by_parameter(path, value, config)}
    modules = [path for path in targeted if path not in read]
    content["target_modules"] = _named_targets(bare, config, modules) if modules else None
    content["target_parameters"] = _named_parameters(bare, config, read)
    content["fan_in_fan_out"] = any(is_conv1d(bare.get_submodule(path)) for path in modules)
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    for field, own in (("rank_pattern", 0), ("alpha_pattern", 1)):
        if not all(map(validate.PLAIN.fullmatch, content[field])):  # no regex is run from a file: say what it came to
            each = {path: config.for_module(path)[own] for path in paths}
            content[field] = {
                path: value for path, value in each.items() if value != (config.r, config.lora_alpha)[own]
            }
    if config.task_type is None:  # PEFT's AutoPeftModel finds the model's class by this
        content["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    content["base_model_name_or_path"] = config.base_model_name_or_path or base or None
    if isinstance(config, VeraConfig) and config.exclude_modules:  # PEFT's VeRA has no such field
        content["target_modules"] = sorted(modules)
    return config.in_file(content)


def _by_parameter(path: str, value: Adapter, config: LoraConfig) -> bool:
    """Whether a file says this layer in ``target_parameters``: experts, routers, and a linear layer that only that field names."""
    if value.on in ("experts", "router"):
        return True
    wanted = config.target_modules
    if isinstance(wanted, str) or not any(ends_with(f"{path}.weight", name) for name in config.target_parameters or ()):
        return False
    return not any(ends_with(path, name) for name in wanted or ())


def _named_parameters(bare: Bare, config: LoraConfig, targeted: Mapping[str, Adapter]) -> list[str] | None:
    """Names of the adapted weights as PEFT's ``target_parameters`` means them: the user's, the shortest that mean exactly these, or their
    paths.
    """
    wanted = [path if value.on == "experts" else f"{path}.weight" for path, value in targeted.items()]
    if not wanted:
        return None
    every = [
        path if is_experts(module) else f"{path}.{name}"
        for path, module in bare.named_modules()
        for name in (("weight",) if is_experts(module) else module._parameters)
    ]
    own = config.target_parameters or ()
    if {path for path in every if any(ends_with(path, name) for name in own)} == set(wanted):
        return sorted(own)
    return short_names(wanted, every)


def _named_targets(bare: Bare, config: LoraConfig, paths: list[str]) -> list[str] | str:
    """Target names that stand for exactly these layers of this model: the user's own, or the shortest list that says the same."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() != ALL_LINEAR:
        return wanted
    if wanted is None and isinstance(default := default_targets(bare), str):
        return default
    if wanted is not None and not isinstance(wanted, str):
        return sorted(wanted)
    endings = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = [path for path, _ in bare.named_modules() if any(ends_with(path, ending) for ending in endings)]
    if set(meant) == set(paths):
        return endings
    chosen = exactly(paths, [path for path, _ in bare.named_modules() if path])
    return chosen if isinstance(chosen, str) else list(chosen)
