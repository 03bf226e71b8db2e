"""Loading: is this the base model, and the config, that the stored adapter was made for? Only then do its tensors go into the slots.

Reading a folder is ``adapter_files.py``, comparing and copying tensors ``fill.py``, writing a folder ``save.py``; the names of the first
and last can be had from here. Next file: ``store/fill.py``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.linear.experts.known import has_projections
from minilora.linear.layers import in_out_features, is_router
from minilora.lora.adapter import Adapter, variant
from minilora.lora.bare import Bare
from minilora.lora.config import LoraConfig
from minilora.lora.inject import build, place
from minilora.lora.match import ALL_LINEAR, match
from minilora.lora.slot import Value
from minilora.lora.slots import adapters_of
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.store.adapter_files import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Stored,
    not_finite,
    read_adapter,
    refuse_regexes,
)
from minilora.store.copies import as_meant
from minilora.store.fill import LoadReport, fill
from minilora.store.fingerprint import differs, fingerprint, strange_tensors
from minilora.store.old_experts import as_today
from minilora.store.projections import same_projections, with_projections
from minilora.store.save import adapter_state_dict, made_with_of, save_adapter, saved_config

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "LoadReport",
    "Stored",
    "adapter_state_dict",
    "fill_adapter",
    "load_adapter",
    "load_values",
    "read_adapter",
    "refuse_regexes",
    "restore_adapter",
    "save_adapter",
    "saved_config",
]

_MODEST = 16_000_000  # numbers that may be allocated on the word of a config


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    strict: bool = True,
    activate: bool = True,
    config: LoraConfig | None = None,
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
) -> LoadReport:
    """Inject the adapter of a folder.

    Args:
        is_trainable: False freezes it.
        strict: False loads what fits and reports the rest.
        activate: make it the active adapter.
        config: use this one and not the file's.
        expect_sha256: refuse any other adapter than the one with this digest, which ``save_adapter`` returns.
        allow_other_base: load it even though it was trained on another base model. The same one packed needs no allowance.

    Returns:
        What was left out (nothing when strict).

    Raises:
        CheckpointError: file and model, or file and config, disagree: missing, unexpected or mis-shaped tensors, each by name; or the
            file was saved on another base model. ConfigError, TargetError, StateError: as ``read_adapter`` and
            ``inject``. The model is then as it was.
    """
    stored, values, report = prepare_adapter(
        model, folder, adapter_name, strict, config, expect_sha256, allow_other_base
    )
    place(model, stored.config, adapter_name, values, stored.variant, activate, is_trainable and activate)
    return report


def prepare_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str,
    strict: bool = True,
    config: LoraConfig | None = None,
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> tuple[Stored, dict[str, Value], LoadReport]:
    """What ``load_adapter`` does before it touches the model: the folder, what goes into each slot, what was left out. Raises as it.

    Args:
        key_mapping: renames the file's tensors: regular expressions, and what each is replaced by; the first that is found counts.
        ignore_mismatched_sizes: leave out a tensor of another shape, and say so in the report.
    """
    bare = Bare(model)
    stored = as_meant(as_today(_read(folder, config, expect_sha256, key_mapping), bare), bare)
    values, report = load_values(model, stored, adapter_name, strict, ignore_mismatched_sizes)
    refuse_other_base(model, stored, allow_other_base)
    return stored, values, report


def _read(
    folder: str | os.PathLike[str],
    config: LoraConfig | None,
    expect_sha256: str | None,
    key_mapping: Mapping[str, str] | None,
) -> Stored:
    stored = read_adapter(folder, config, expect_sha256)
    if not key_mapping:
        return stored
    return dataclasses.replace(stored, tensors={renamed(k, key_mapping): t for k, t in stored.tensors.items()})


def renamed(key: str, mapping: Mapping[str, str]) -> str:
    """A tensor's name after the first of the expressions that is found in it."""
    name = key.removeprefix(PREFIX)
    for pattern, new in mapping.items():
        renamed, found = re.subn(pattern, new, name)
        if found:
            return key[: len(key) - len(name)] + renamed
    return key


def restore_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    strict: bool = True,
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Copy a folder's tensors into an adapter that the model has already: resuming, not adding. What trains does not change.

    Arguments and what is returned are those of ``load_adapter`` and ``prepare_adapter``.

    Raises:
        CheckpointError: as ``load_adapter``. StateError: no such adapter, or it is merged. The adapter is then as it was.
    """
    stored, adapters = as_today(_read(folder, None, expect_sha256, key_mapping), Bare(model)), adapters_of(model)
    refuse_other_base(model, stored, allow_other_base)
    own, kind = adapters.configs.get(adapter_name), adapters.variants.get(adapter_name)
    for path, value in adapters.named(adapter_name).items():
        if own is not None and isinstance(value, Adapter):
            found, wanted = ((*config.for_module(path), config.use_rslora) for config in (stored.config, own))
            if found != wanted or stored.variant != kind:
                said = f"(r, lora_alpha, rslora) = {found} as {stored.variant}, the adapter {wanted} as {kind}"
                raise CheckpointError(
                    f"{stored.path}: {path} has {said}; resume with the config that it was saved with, or load it under another name"
                )
    adapters.refuse_merged(adapter_name)
    stored = same_projections(adapters.named(adapter_name), stored)
    return fill(model, adapters.named(adapter_name), stored, strict, False, ignore_mismatched_sizes)


def fill_adapter(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter_name: str = "default",
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Copy tensors, named as in a file, into an adapter that the model has already. Raises as ``restore_adapter``; all or nothing."""
    adapters = adapters_of(model)
    values = adapters.named(adapter_name)
    adapters.refuse_merged(adapter_name)
    stored = Stored(adapters.configs[adapter_name], dict(tensors), adapters.variants[adapter_name], Path("state dict"))
    if (bad := not_finite(stored.tensors)) is not None:
        raise CheckpointError(f"{stored.path}: {bad} holds NaN or infinity; the run that saved it had diverged")
    stored = same_projections(values, as_today(stored, Bare(model)))
    return fill(model, values, stored, strict, False, ignore_mismatched_sizes)


def load_values(
    model: nn.Module, stored: Stored, adapter_name: str, strict: bool = True, ignore_mismatched_sizes: bool = False
) -> tuple[dict[str, Value], LoadReport]:
    """What a stored adapter puts into each slot, without touching the model, and what was left out. Raises as ``load_adapter``."""
    config = _exact(stored, Bare(model))
    _refuse_huge(model, config, stored)
    values = build(model, config, adapter_name, stored.variant)
    replaced = [value for value in values.values() if isinstance(value, Adapter) and value.base_replaced]
    if replaced and made_with_of(values) != stored.made_with:
        raise CheckpointError(
            f"{stored.path}: its {stored.variant} layers were made with another calibration; load it inside the block that it was made "
            "in (variants.loftq.calibrated), or onto its packed base"
        )
    stored = with_projections(values, stored)
    report = fill(model, values, stored, strict, True, ignore_mismatched_sizes)
    return values, dataclasses.replace(report, ignored_config_keys=stored.ignored)


def refuse_other_base(model: nn.Module, stored: Stored, allow: bool = False) -> None:
    """Raise ``CheckpointError`` if the adapter remembers another base model than this one."""
    if stored.base is None or allow:
        return
    known = dict(Bare(model).named_modules())
    found = fingerprint(model, [path for path in stored.base["samples"] if path in known])
    own_base = variant(stored.variant).replaces_base
    if point := differs(stored.base, found, own_base) or strange_tensors(model, stored.base):
        raise CheckpointError(
            f"{stored.path}: was trained on another base model than this {type(model).__name__}: {point}; load its own, or pass "
            "allow_other_base=True (--allow-other-base)"
        )


def _refuse_huge(model: nn.Module, config: LoraConfig, stored: Stored) -> None:
    """Compare the ranks of a config with the file before memory is taken for them: a few bytes of JSON could ask for all of it."""
    targets, bare = match(model, config).targets, Bare(model)
    sizes = {path: sum(in_out_features(bare.get_submodule(path))) for path in targets}
    there = sum(tensor.numel() for tensor in stored.tensors.values())
    ranks = {path: config.for_module(path)[0] for path in targets}
    if sum(ranks[path] * sizes[path] for path in targets) <= _MODEST + 2 * there:
        return
    sides = {side for tensor in stored.tensors.values() for side in tensor.shape}
    for path, r in ranks.items():
        if r not in sides:
            raise CheckpointError(
                f"{stored.path}: the config says r={r} for {path}, and no tensor of the file has that rank; export the adapter again"
            )


def _exact(stored: Stored, bare: Bare) -> LoraConfig:
    """The config without regular expressions of the file: targets become the layers that have tensors in it."""
    refuse_regexes(stored)
    config = stored.config
    names = [name for name in (config.target_modules, config.exclude_modules) if isinstance(name, str)]
    # Of a file these fields mean layers only, as in PEFT, whose experts are all that target_parameters names.
    narrowed = config.target_parameters and (config.exclude_modules or config.layers_to_transform is not None)
    if not stored.from_file or (all(name.lower() == ALL_LINEAR for name in names) and not narrowed):
        return config
    files = [f".{name}" for kind in (variant(stored.variant), LoRAEmbedding) for name in kind.file_names.values()]
    keys = [key.removeprefix(PREFIX) for key in stored.tensors]
    paths = {key.removesuffix(file) for key in keys for file in files if key.endswith(file)}
    paths = {
        path for path in paths if "base_layer" not in path.split(".")
    }  # an attention's output projection goes with its attention, one projection of experts with the other
    others = {path for path, module in bare.named_modules() if has_projections(module) or is_router(module)}
    paths -= others  # of experts and routers target_parameters says which, and it has no expressions
    return dataclasses.replace(
        config,
        target_modules="|".join(map(re.escape, sorted(paths))) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
