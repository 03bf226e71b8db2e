"""The walker: find what a config means, refuse on any doubt, and only then replace.

``inject`` puts adapters into a model; ``quantize_model`` puts packed weights into it. Both list all their matches first, so a
mistake leaves the model exactly as it was. Next file: ``adapted.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from minilora.adapter import Adapter, variant
from minilora.architectures import DEFAULT_TARGETS
from minilora.config import LoraConfig, QuantConfig
from minilora.errors import StateError, TargetError
from minilora.layers import QuantLinear, dense_weight, is_linear, is_quantized
from minilora.quantize import refuse_nonfinite
from minilora.slots import Adapters, Slot, Value, adapters_of, attach, has_adapters
from minilora.targets import Selection, ends_with, select

ALL_LINEAR = "all-linear"
# A new task head is trained whole: PEFT's rule by task type.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Match:
    """What a config means on one model: dotted paths, in the model's order."""

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]


def match(model: nn.Module, config: LoraConfig) -> Match:
    """List what ``config`` selects on the bare ``model``, without touching it.

    Raises:
        TargetError: an entry matches nothing (with the closest names), a match is no linear layer, is shared between two places,
            or nothing is left to adapt.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    saved = _saved(modules, config)
    targets = _wanted(model, modules, config)
    if config.exclude_modules is not None:
        excluded = set(select(modules, config.exclude_modules, "exclude_modules"))
        targets = [path for path in targets if path not in excluded]
    targets = [path for path in targets if not any(path == place or path.startswith(place + ".") for place in saved)]
    if not targets:
        raise TargetError("nothing is left to adapt after exclude_modules and modules_to_save; loosen one of them")
    _refuse_unfit(model, modules, targets)
    return Match(tuple(targets), tuple(saved), tuple(_biases(model, config, targets, saved)))


def _wanted(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        heads = _HEADS.get(config.task_type or "", ())
        return [path for path in linear_paths(model) if not any(ends_with(path, head) for head in heads)]
    if wanted is not None:
        return select(modules, wanted, "target_modules")
    default = default_targets(model)
    if isinstance(default, str):
        return select(modules, default, "target_modules")
    present = [entry for entry in default if any(ends_with(path, entry) for path in modules)]
    return select(modules, present or default, "target_modules")


def default_targets(model: nn.Module) -> Selection:
    """What ``target_modules=None`` means for this architecture. Raises ``TargetError`` for one that the table lacks."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise TargetError(
            f"target_modules=None has no default for model_type={kind!r}; name the layers, or use 'all-linear'"
        )
    return DEFAULT_TARGETS[kind]


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of every linear layer but the output head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [path for path, module in model.named_modules() if path and is_linear(module) and module is not output]


def _saved(modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    names = tuple(config.modules_to_save or ())
    heads = [head for head in _HEADS.get(config.task_type or "", ()) if any(ends_with(path, head) for path in modules)]
    if not names and not heads:
        return []
    return select(modules, (*names, *heads), "modules_to_save")


def _refuse_unfit(model: nn.Module, modules: dict[str, nn.Module], targets: list[str]) -> None:
    for path in targets:
        module = modules[path]
        if isinstance(module, Adapter):
            raise StateError(
                f"{path} carries an adapter already; add another with add_adapter, or merge_and_unload() first"
            )
        if not is_linear(module):
            inside = [f"{path}.{name}" for name, child in module.named_modules() if name and is_linear(child)]
            hint = f"; name its linear layers, such as {inside[0]!r}" if inside else "; wanted Linear or Conv1D"
            raise TargetError(f"{path} is a {type(module).__name__}, which takes no adapter{hint}")
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        first = places.setdefault(id(module), path)
        if first != path and first in targets:
            raise TargetError(
                f"{first} and {path} are one shared layer; give each its own copy, or exclude it with exclude_modules"
            )


def _biases(model: nn.Module, config: LoraConfig, targets: list[str], saved: list[str]) -> list[str]:
    """Paths of the bias parameters that train (those of a copied module train in the copy)."""
    every = [
        path
        for path, parameter in model.named_parameters()
        if path.rsplit(".", 1)[-1] == "bias" and parameter.is_floating_point()
    ]
    every = [path for path in every if not any(path.startswith(place + ".") for place in saved)]
    if config.bias == "all":
        return every
    return [path for path in every if path.rpartition(".")[0] in targets] if config.bias == "lora_only" else []


def build(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> dict[str, Value]:
    """What a new adapter puts into each slot, by path: adapters, copies of modules, copies of biases. The model is not touched.

    Raises:
        TargetError: as ``match``. StateError: the name is taken.
    """
    adapters = adapters_of(model) if has_adapters(model) else Adapters()
    if adapter_name in adapters.configs:
        raise StateError(
            f"an adapter is called {adapter_name!r} already; choose another name, or delete_adapter({adapter_name!r}) first"
        )
    with adapters.bare():
        found = match(model, config)
        make = variant("lora")
        values: dict[str, Value] = {}
        for path in found.targets:
            values[path] = make(model.get_submodule(path), config, path).train(model.training)
        for path in found.saved:
            values[path] = copy.deepcopy(model.get_submodule(path)).requires_grad_(True)
        for path in found.biases:
            values[path] = nn.Parameter(model.get_parameter(path).detach().clone())
    return values


def place(model: nn.Module, config: LoraConfig, adapter_name: str, values: Mapping[str, Value]) -> None:
    """Put what ``build`` made into the model and make it the active adapter; the first one freezes the model."""
    if not has_adapters(model):
        model.requires_grad_(False)
        attach(model, Adapters())
    adapters = adapters_of(model)
    for path, value in values.items():
        slot = adapters.slots[path] = adapters.slots.get(path) or _slot(model, path)
        slot.kept[adapter_name] = value
    adapters.configs[adapter_name] = config
    adapters.activate([adapter_name])


def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> nn.Module:
    """Put a new adapter into every layer that ``config`` selects, freeze the rest, and make it the active one.

    Args:
        model: any module; changed in place and returned.
        config: what to adapt; never changed.
        adapter_name: what switching and saving call it.

    Raises:
        TargetError, StateError: as ``build``. Nothing has changed then.
    """
    place(model, config, adapter_name, build(model, config, adapter_name))
    return model


def _slot(model: nn.Module, path: str) -> Slot:
    parent_path, _, attr = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    return Slot(path, parent, attr, getattr(parent, attr))


def quantize_model(
    model: nn.Module, config: QuantConfig | None = None, target_modules: Selection = ALL_LINEAR
) -> nn.Module:
    """Replace linear layers by ``QuantLinear``, in place, one layer at a time: two dense copies of at most one layer exist at once.

    Args:
        model: any module; changed in place, frozen layers replaced, and returned.
        config: format, blocksize, double quantization; default NF4, 64, single.
        target_modules: list of names, one regex, or "all-linear" (all but the output head).

    Raises:
        TargetError: an entry matches nothing, or a match is no dense linear layer. StateError: the model carries adapters already.
        QuantizationError: a weight holds NaN or infinity; every layer is checked before the first is replaced.
    """
    if has_adapters(model):
        raise StateError("the model carries adapters; quantize it first and inject then")
    config = config or QuantConfig()
    paths = _dense_paths(model, target_modules)
    for path in paths:  # all of them before the first is replaced
        refuse_nonfinite(dense_weight(model.get_submodule(path)), path + ".weight")
    for path in paths:
        slot = _slot(model, path)
        layer = QuantLinear.from_linear(slot.base, config, path + ".weight")  # type: ignore[arg-type]
        setattr(slot.parent, slot.attr, layer.train(model.training))
    return model


def _dense_paths(model: nn.Module, target_modules: Selection) -> list[str]:
    """Paths of the layers to quantize; one that is packed already is passed over by "all-linear" and refused by name."""
    modules = {path: module for path, module in model.named_modules() if path}
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        paths = [path for path in linear_paths(model) if not is_quantized(modules[path])]
    else:
        paths = select(modules, target_modules, "target_modules")
    _refuse_unfit(model, modules, paths)
    if packed := [path for path in paths if is_quantized(modules[path])]:
        raise TargetError(f"{packed[0]} is quantized already; leave it out of target_modules")
    if not paths:
        raise TargetError("no dense linear layer is left to quantize")
    return paths
