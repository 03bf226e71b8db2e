"""What a config means on one model: the layers that get an adapter, the modules copied whole, the biases and token rows that train.

``match`` lists all of it and touches nothing, so a mistake is refused while the model is as it was. How a name selects modules is
``lora/targets.py``; what ``target_modules=None`` means, ``lora/architectures.py``. Next file: ``lora/inject.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.errors import StateError, TargetError, nearest
from minilora.linear.experts.hook import refuse_strange_experts
from minilora.linear.experts.layers import is_experts
from minilora.linear.experts.routers import routers_among
from minilora.linear.layers import is_foreign, is_linear, is_quantized, kind_of
from minilora.lora.adapter import Adapter
from minilora.lora.architectures import DEFAULT_TARGETS
from minilora.lora.bare import Bare
from minilora.lora.bases import (
    is_more_than_its_weight,
    is_read_by_parent,
    refuse_nested,
    refuse_not_a_weight,
    refuse_odd_attention,
)
from minilora.lora.config import LoraConfig
from minilora.lora.targets import Selection, ends_with, exactly, inside, layer_index, select, select_by_ending

ALL_LINEAR = "all-linear"
# A new task head is trained whole: PEFT's rule by task type.
HEADS_OF_PEFT = ("classifier", "score")
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Match:
    """What a config means on one model: dotted paths, in the model's order."""

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    tokens: dict[str, Sequence[int]]


def match(model: nn.Module, config: LoraConfig) -> Match:
    """List what ``config`` selects on the bare ``model``, without touching it.

    Raises:
        TargetError: an entry matches nothing (with the closest names), a match is no linear layer, is shared between two places,
            or nothing is left to adapt.
    """
    bare = Bare(model)
    refuse_nested(bare.named_modules())
    modules = {path: module for path, module in bare.named_modules() if path}
    saved = _saved(modules, config)
    targets = _wanted(bare, modules, config)
    if config.exclude_modules is not None:
        excluded = set(select(modules, config.exclude_modules, "exclude_modules"))
        targets = [path for path in targets if path not in excluded and not _is_inside(path, modules, excluded)]
    copied = set(saved)
    targets = [path for path in targets if not inside(path, copied)]
    targets = _in_layers(targets, config)
    if not targets:
        raise TargetError(
            "No modules were targeted for adaptation. This might be caused by a combination of target_modules, exclude_modules and "
            "modules_to_save that leaves none; loosen one of them"
        )
    if config.ensure_weight_tying:
        targets = _with_tables(modules, targets)
    refuse_unfit(bare, modules, targets)
    _refuse_idle_patterns(config, targets)
    tokens = _tokens(bare, modules, config)
    for path in tokens:
        if (copy := inside(path, copied)) is not None:
            raise TargetError(
                f"trainable_token_indices: {path} is in modules_to_save as {copy!r}. The embedding layer is already marked to be trained "
                "fully; drop one of the two"
            )
    return Match(tuple(targets), tuple(saved), tuple(_biases(bare, config, targets, saved)), tokens)


def _is_inside(path: str, modules: Mapping[str, nn.Module], places: set[str]) -> bool:
    """Whether this is a projection of experts whose module is one of ``places``: who leaves that out leaves out what is in it."""
    return is_experts(modules[path]) and inside(path, places) is not None


def _wanted(bare: Bare, modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    """The paths that ``target_modules`` and ``target_parameters`` name together, in the model's order."""
    named = _parameters(modules, config)
    layers = {path: module for path, module in modules.items() if not is_experts(module)}
    if config.target_modules is not None or not named:
        named |= set(_modules(bare, layers, config, modules))
    return [path for path in modules if path in named]


def _parameters(modules: Mapping[str, nn.Module], config: LoraConfig) -> set[str]:
    """Paths of the experts' projections, routers and linear layers whose weights ``target_parameters`` names."""
    if config.target_parameters is None:
        return set()
    weights = {
        path if is_experts(module) else f"{path}.weight": path
        for path, module in modules.items()
        if _has_weight(module)
    }
    return {weights[name] for name in select(weights, config.target_parameters, "target_parameters")}


def _has_weight(module: nn.Module) -> bool:
    """Whether ``target_parameters`` can name its weight."""
    return kind_of(module) in ("linear", "experts", "router")


def _modules(
    bare: Bare, modules: dict[str, nn.Module], config: LoraConfig, every: Mapping[str, nn.Module]
) -> Iterable[str]:
    """Paths that ``target_modules`` names; experts' projections are among them for "all-linear" only, as in PEFT."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        heads = _HEADS.get(config.task_type or "", ())
        tied = _tables(modules) if config.ensure_weight_tying else {}  # a head that is tied stays so, with no adapter
        linear = [path for path in linear_paths(bare) if _weight(every[path]) not in tied]
        return [path for path in linear if not any(ends_with(path, head) for head in heads)]
    if wanted is not None:
        try:
            return select(modules, wanted, "target_modules")
        except TargetError as error:
            names = [wanted] if isinstance(wanted, str) else list(wanted)
            if held := [
                path for path in every if is_experts(every[path]) and any(ends_with(path, name) for name in names)
            ]:
                raise TargetError(
                    f"{held[0]} is a weight of experts and no module; name it in target_parameters"
                ) from error
            raise
    default = default_targets(bare)
    if isinstance(default, str):
        return select(modules, default, "target_modules")
    present = [entry for entry in default if any(ends_with(path, entry) for path in modules)]
    return select(modules, present or default, "target_modules")


def targets_of(bare: Bare, paths: Sequence[str]) -> dict[str, Any]:
    """The fields of a config that means exactly the layers at these paths: ``target_modules``, and ``target_parameters`` for weights that
    belong to no linear layer.
    """
    modules = {path: module for path, module in bare.named_modules() if path}
    kinds = {path: kind_of(modules[path]) for path in paths}
    bare_weights = [
        path if kinds[path] == "experts" else f"{path}.weight" for path in paths if kinds[path] in ("experts", "router")
    ]
    layers = tuple(path for path in paths if kinds[path] not in ("experts", "router"))
    known = [path for path, module in modules.items() if not is_experts(module)]
    return {"target_modules": exactly(layers, known) if layers else None, "target_parameters": bare_weights or None}


def default_targets(model: nn.Module | Bare) -> Selection:
    """What ``target_modules=None`` means for this architecture. Raises ``TargetError`` for one that the table lacks."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise TargetError(
            f"target_modules=None has no default for model_type={kind!r}; name the layers, or use 'all-linear'"
        )
    return DEFAULT_TARGETS[kind]


def linear_paths(model: nn.Module | Bare, routers: bool = False) -> list[str]:
    """Paths of every linear layer, experts' projections included, but the output head, those that are more than their weight, those known
    to be read only and, without ``routers``, those by which a mixture chooses its experts: an adapter on them is asked for.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict((model if isinstance(model, Bare) else Bare(model)).named_modules())
    left = set() if routers else routers_among(modules)
    found = [path for path, module in modules.items() if path and (is_linear(module) or is_experts(module))]
    linear = [path for path in found if modules[path] is not output and (not left or inside(path, left) is None)]
    return [
        path for path in linear if not is_read_by_parent(modules, path) and not is_more_than_its_weight(modules[path])
    ]


def _saved(modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    # PEFT names both heads that a classifier may have, whichever the model has.
    usual = [name for name in HEADS_OF_PEFT if any(path.endswith(name) for path in modules)]
    names = tuple(
        name for name in config.modules_to_save or () if not usual or name in usual or name not in HEADS_OF_PEFT
    )
    heads = [head for head in _HEADS.get(config.task_type or "", ()) if any(path.endswith(head) for path in modules)]
    if not names and not heads:
        return []
    saved = select_by_ending(modules, (*names, *heads), "modules_to_save")
    copied = set(saved)
    for path in saved:
        if (outer := inside(path.rpartition(".")[0], copied)) is not None:
            raise TargetError(f"modules_to_save: {path} lies in {outer}, which is copied whole; name only one of them")
        if packed := [
            name for name, module in modules[path].named_modules() if is_quantized(module) or is_foreign(module)
        ]:
            raise TargetError(
                f"modules_to_save: {path} is quantized{' in ' + packed[0] if packed[0] else ''} and cannot be trained whole; "
                "name another, or give the dense model"
            )
    return saved


def refuse_unfit(model: nn.Module | Bare, modules: dict[str, nn.Module], targets: Iterable[str]) -> None:
    wanted = set(targets)
    for path in targets:
        module = modules[path]
        if isinstance(module, Adapter):
            raise StateError(
                f"{path} carries an adapter already; add another with add_adapter, or merge_and_unload() first"
            )
        if kind_of(module) is None:
            inside = [f"{path}.{name}" for name, child in module.named_modules() if name and is_linear(child)]
            within = [name for name in modules if name.startswith(f"{path}.") and is_experts(modules[name])]
            if within:
                inside = [".".join(within[0].split(".")[-3:])]
            hint = (
                f"; name its {'weights in target_parameters' if within else 'linear layers'}, such as {inside[0]!r}"
                if inside
                else "; wanted Linear, Conv1D or Embedding, Conv1d to Conv3d, or MultiheadAttention"
            )
            raise TargetError(f"{path} is a {type(module).__name__}, which takes no adapter{hint}")
        if is_experts(module):
            refuse_strange_experts(path, modules[path.rpartition(".")[0]])
        if isinstance(module, nn.MultiheadAttention):
            refuse_odd_attention(path, module, modules[f"{path}.out_proj"])
        refuse_not_a_weight(path, module)
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        first = places.setdefault(id(module), path)
        if first != path and first in wanted:
            raise TargetError(
                f"{first} and {path} are one shared layer; give each its own copy, or exclude it with exclude_modules"
            )


def _refuse_idle_patterns(config: LoraConfig, targets: list[str]) -> None:
    """A pattern that no adapted layer matches is a typo, and its rank or alpha would silently not apply."""
    for field, keys in (("rank_pattern", config.rank_keys), ("alpha_pattern", config.alpha_keys)):
        meant = {key for path in targets for key in keys.all(path)} if keys.keys else set()
        for key in keys.keys:
            if key not in meant:
                known = {path.rsplit(".", 1)[-1] for path in targets}
                raise TargetError(
                    f"{field} key {key!r} matches no adapted layer; their names are {nearest(key, known)}"
                )


def _in_layers(targets: list[str], config: LoraConfig) -> list[str]:
    """The targets in the layers that ``layers_to_transform`` names; one given by its full path stays (PEFT's rule)."""
    wanted = config.layers_to_transform
    if wanted is None:
        return targets
    named = set() if isinstance(config.target_modules, str) else set(config.target_modules or ())
    index_of = {path: layer_index(path, config.layers_pattern) for path in targets}
    known = sorted({index for index in index_of.values() if index is not None})
    chosen = {wanted} if isinstance(wanted, int) else set(wanted)
    if missing := sorted(chosen - set(known)):
        where = f"layers {known[0]} to {known[-1]}" if known else "no numbered layer"
        raise TargetError(f"layers_to_transform: {missing[0]} is not there; target_modules are found in {where}")
    return [path for path, index in index_of.items() if index in chosen or path in named]


def _with_tables(modules: dict[str, nn.Module], targets: list[str]) -> list[str]:
    """The targets, and for a head that is tied to a table of which none is a target, its first table: so that they stay one."""
    tables = _tables(modules)
    tied = [tables.get(_weight(modules[path]), []) for path in targets]
    chosen = set(targets).union(paths[0] for paths in tied if paths and not set(paths) & set(targets))
    return [path for path in modules if path in chosen]


def _tables(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """The weights of all tables, and the paths of each."""
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Embedding):
            found.setdefault(_weight(module), []).append(path)
    return found


def _weight(module: nn.Module) -> int:
    return id(module._parameters.get("weight", module))


def _tokens(bare: Bare, modules: dict[str, nn.Module], config: LoraConfig) -> dict[str, Sequence[int]]:
    """Embedding path to the rows that train."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if isinstance(wanted, Mapping):
        by_path = {
            path: ids for name, ids in wanted.items() for path in select(modules, [name], "trainable_token_indices")
        }
    else:
        table = bare.get_input_embeddings()
        by_path = {path: wanted for path, module in modules.items() if module is table}
        if not by_path:
            raise TargetError(
                "trainable_token_indices as a list wants a model with get_input_embeddings(); give {'name': [...]} instead"
            )
    head = bare.get_output_embeddings()
    for path in by_path:
        if not (isinstance(modules[path], nn.Embedding) or (is_linear(modules[path]) and modules[path] is head)):
            raise TargetError(
                f"trainable_token_indices: {path} is a {type(modules[path]).__name__}; wanted an Embedding, or the output head"
            )
        refuse_not_a_weight(path, modules[path])
    # Tables first: they bring along what is tied to them.
    return dict(sorted(by_path.items(), key=lambda item: not isinstance(modules[item[0]], nn.Embedding)))


def _biases(bare: Bare, config: LoraConfig, targets: list[str], saved: list[str]) -> list[str]:
    """Paths of the bias parameters that train (those of a copied module train in the copy)."""
    if config.bias not in ("all", "lora_only"):
        return []
    held: dict[int, list[str]] = {}  # one bias may belong to several modules, and trains in all of them
    for path, module in bare.named_modules():
        for name, parameter in bare.parameters_of(module):
            if parameter.is_floating_point():
                held.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    chosen = [paths for paths in held.values() if any(path.rsplit(".", 1)[-1] == "bias" for path in paths)]
    copied, adapted = set(saved), set(targets)
    chosen = [paths for paths in chosen if not any(inside(path, copied) for path in paths)]
    if config.bias == "lora_only":
        chosen = [paths for paths in chosen if any(path.rpartition(".")[0] in adapted for path in paths)]
    return [path for paths in chosen for path in paths]
