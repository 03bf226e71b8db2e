"""Adapter files of the time when each expert was three linear layers, on models of today, where all experts are one module.

    experts.3.gate_proj, experts.3.up_proj (w1, w3)   ->  expert 3 of experts.gate_up_proj
    experts.3.down_proj (w2)                          ->  expert 3 of experts.down_proj

Gate and up lie one above the other in one weight, so their updates do too: ``A = [A_gate; A_up]``, ``B = [[B_gate, 0], [0, B_up]]``, and
rank and ``lora_alpha`` are doubled, which leaves the scaling. It is the same update to the last bit. A smaller rank, a half and an expert
without an adapter are zeros. Dense layers of the same names keep their adapters. Next file: ``store/contents.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.linear.experts.known import declared, has_projections, known_experts, owner_of
from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import is_router
from minilora.lora.bare import Bare
from minilora.lora.config import LoraConfig
from minilora.lora.patterns import Patterns
from minilora.lora.targets import ends_with, short_names
from minilora.lora.variants.experts import in_file
from minilora.store.adapter_files import PREFIX, Stored

__all__ = ["as_today", "lost_in_peft"]

_EXPERT = re.compile(r"(?P<home>.+)\.(?P<expert>\d+)\.(?P<layer>[^.]+)\.(?P<part>lora_.+)")
# What each projection was before it was one: its halves, from the top, and the names that each had.
_HALVES = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "gate_proj": (("gate_proj", "w1"),),
    "up_proj": (("up_proj", "w3"),),
    "down_proj": (("down_proj", "w2"),),
}
# Parts of a path that transformers has renamed since, tried where a file's path is not there.
_RENAMED = (("block_sparse_moe", "mlp"), ("block_sparse_moe.gate", "mlp.router"), ("router.layer", "router"))
_Pairs = dict[tuple[int, str], dict[str, Tensor]]  # (expert, layer) -> {"lora_A.weight": ..., "lora_B.weight": ...}


@dataclasses.dataclass
class _Fused:
    """One projection of all experts: its factors ``A [E, r, in]`` and ``B [E, out, r]``, and what the config has to say of it."""

    path: str
    A: Tensor
    B: Tensor
    r: int
    lora_alpha: int | float


def as_today(stored: Stored, bare: Bare) -> Stored:
    """The adapter with the experts of this model; itself where it has no expert that is a layer, or the model has such layers.

    Raises:
        CheckpointError: what the experts of this model cannot hold, by name: another variant than plain LoRA, an expert or a layer that
            they have not, a shape that does not fit, a factor that is missing.
    """
    if not any(_EXPERT.fullmatch(key) for key in stored.tensors):
        return stored
    modules = dict(bare.named_modules())
    homes: dict[str, _Pairs] = {}
    before: dict[str, str] = {}  # a home as it is called now -> as the file calls it
    rest: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        found = _EXPERT.fullmatch(key.removeprefix(PREFIX))
        home = found and _today(found["home"], modules)
        if not found or not home or home not in modules or not has_projections(modules[home]):
            rest[PREFIX + _today(key.removeprefix(PREFIX), modules)] = tensor
            continue
        before[home] = found["home"]
        pair = homes.setdefault(home, {}).setdefault((int(found["expert"]), found["layer"]), {})
        pair[found["part"]] = tensor
    if not homes:
        return stored
    if stored.variant != "lora":
        raise CheckpointError(
            f"{stored.path}: {before[next(iter(homes))]} are single layers with {stored.variant} adapters, which joined experts "
            "cannot take over; merge them with the transformers 4 that made them"
        )
    _refuse_missing(stored, modules, homes, before)
    fused: list[_Fused] = []
    tensors = dict(rest)
    for home, pairs in homes.items():
        own = _fused(stored, bare, home, before[home], pairs)
        for at, name in enumerate(reversed(declared(own))):
            owner = f"{PREFIX}{home}{'.base_layer' * at}"
            tensors[f"{owner}.lora_A.weight"] = in_file("lora_A", own[name].A).contiguous()
            tensors[f"{owner}.lora_B.weight"] = in_file("lora_B", own[name].B).contiguous()
        fused += own.values()
    old = [f"{before[home]}.{expert}.{layer}" for home, pairs in homes.items() for expert, layer in pairs]
    config = _config(stored.config, modules, fused, rest, old)
    return dataclasses.replace(stored, tensors=tensors, config=config)


def _today(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A path of a file as the model calls it now; a tensor's name likewise, by the module that it belongs to."""
    owner = path.partition(".lora_")[0]
    if owner in modules:
        return path
    for old, new in _RENAMED:
        renamed = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\g<2>", owner)
        if renamed != owner and renamed in modules:
            return renamed + path[len(owner) :]
    return path


def _fused(stored: Stored, bare: Bare, home: str, before: str, pairs: _Pairs) -> dict[str, _Fused]:
    """The projections of one module of experts that the file has something of, by name."""
    known = known_experts(owner_of(bare.get_submodule(home)))
    assert known is not None  # it has projections
    left, own = dict(pairs), {}
    for name in known.names:
        halves = [
            {expert: left.pop((expert, layer)) for expert, layer in list(left) if layer in names}
            for names in _HALVES.get(name, ())
        ]
        if any(halves):
            own[name] = _one(stored, bare, f"{home}.{name}", before, halves, _HALVES[name])
    if left:
        expert, layer = next(iter(left))
        raise CheckpointError(
            f"{stored.path}: {before}.{expert}.{layer}: these experts have no such layer any more, they have {', '.join(known.names)}; "
            "another base model?"
        )
    return own


def _one(stored: Stored, bare: Bare, path: str, before: str, halves: Sequence[Mapping[int, Mapping[str, Tensor]]],
         names: Sequence[Sequence[str]]) -> _Fused:  # fmt: skip
    layer: Any = bare.get_submodule(path)
    experts, rows = layer.experts, layer.out_features // len(halves)
    factors: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}
    for at, half in enumerate(halves):
        for expert, pair in half.items():
            old = next(
                f"{before}.{expert}.{name}" for name in names[at] if _in_file(stored, f"{before}.{expert}.{name}")
            )
            if expert >= experts:
                raise CheckpointError(f"{stored.path}: {old}: {path} has {experts} experts; another base model?")
            factors[at, expert] = (*_pair(stored, old, pair, layer.in_features, rows), stored.config.scaling(old))
    ranks = [max((len(factors[at, expert][0]) for expert in half), default=0) for at, half in enumerate(halves)]
    first = next(iter(factors.values()))
    scaling, dtype = first[2], torch.promote_types(first[0].dtype, first[1].dtype)
    same = all(each[2] == scaling for each in factors.values())
    dtype = dtype if same else torch.float32
    A = torch.zeros(experts, sum(ranks), layer.in_features, dtype=dtype)
    B = torch.zeros(experts, layer.out_features, sum(ranks), dtype=dtype)
    together = getattr(owner_of(bare.get_submodule(path.rpartition(".")[0])), "is_concatenated", True)
    for (at, expert), (a, b, own) in factors.items():
        start = sum(ranks[:at])
        lines = slice(at * rows, (at + 1) * rows) if together else slice(at, None, len(halves))
        A[expert, start : start + len(a)] = a
        B[expert, lines, start : start + len(a)] = b if same else b.float() * (own / scaling)
    share = sum(ranks) / len(first[0])
    alpha = scaling * (len(first[0]) ** 0.5 * share**0.5 if stored.config.use_rslora else len(first[0]) * share)
    return _Fused(path, A, B, sum(ranks), int(alpha) if alpha == int(alpha) else alpha)


def _in_file(stored: Stored, old: str) -> bool:
    return any(f"{PREFIX}{old}.lora_{side}.weight" in stored.tensors for side in "AB")


def _pair(stored: Stored, old: str, pair: Mapping[str, Tensor], columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])`` of one layer of one expert."""
    A, B = pair.get("lora_A.weight"), pair.get("lora_B.weight")
    if A is None or B is None or len(pair) > 2:
        raise CheckpointError(
            f"{stored.path}: {old} has {', '.join(sorted(pair))}; wanted lora_A.weight and lora_B.weight alone"
        )
    r = stored.config.for_module(old)[0]
    if A.shape != (r, columns) or B.shape != (rows, r):
        raise CheckpointError(
            f"{stored.path}: {old} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, config and model want {[r, columns]} "
            f"and {[rows, r]}; wrong base model or r"
        )
    return A, B


def _refuse_missing(stored: Stored, modules: Mapping[str, nn.Module], homes: Mapping[str, _Pairs],
                    before: Mapping[str, str]) -> None:  # fmt: skip
    """Where the config names layers of experts, each expert must have them."""
    config, entries = stored.config, stored.config.target_modules
    if isinstance(entries, str) or config.layers_to_transform is not None or config.exclude_modules is not None:
        return
    for home, module in modules.items():
        known = known_experts(owner_of(module)) if has_projections(module) else None
        names = [name for each in (known.names if known else ()) for half in _HALVES.get(each, ()) for name in half]
        layer: Any = modules.get(f"{home}.{known.names[-1]}") if known else None
        for expert in range(layer.experts if layer is not None else 0):
            for name in names:
                old = f"{before.get(home, home)}.{expert}.{name}"
                if any(ends_with(old, entry) for entry in entries or ()) and (expert, name) not in homes.get(home, {}):
                    raise CheckpointError(
                        f"{stored.path}: {old} is missing, which the config asks for; another base model, or a file that was cut?"
                    )


def _config(config: LoraConfig, modules: Mapping[str, nn.Module], fused: Sequence[_Fused], rest: Iterable[str],
            old: Sequence[str]) -> LoraConfig:  # fmt: skip
    """The config that means the same on today's model."""
    left = [key.removeprefix(PREFIX).partition(".lora_")[0] for key in rest if ".lora_" in key]
    chosen = {path for path in left if path in modules and is_router(modules[path])}
    weights = {
        path: path if is_experts(module) else f"{path}.weight"
        for path, module in modules.items()
        if is_experts(module) or is_router(module)
    }
    now = [*left, *(each.path for each in fused)]
    named = short_names([weights[path] for path in (*(each.path for each in fused), *chosen)], weights.values())

    def pattern(given: Mapping[str, Any], of: str) -> dict[str, Any]:
        keys = Patterns(given)
        gone = {key for path in old for key in keys.all(path)} - {key for path in now for key in keys.all(path)}
        kept = {key: value for key, value in given.items() if key not in gone}
        return _of_projections(fused, of, Patterns(kept), kept, getattr(config, of)) | kept

    return dataclasses.replace(
        config,
        target_parameters=tuple(dict.fromkeys((*(config.target_parameters or ()), *named))),
        target_modules=_there(config.target_modules, [path for path in modules if not is_experts(modules[path])]),
        exclude_modules=_there(config.exclude_modules, modules),
        rank_pattern=pattern(config.rank_pattern, "r"),
        alpha_pattern=pattern(config.alpha_pattern, "lora_alpha"),
    )


def _of_projections(
    fused: Sequence[_Fused], of: str, keys: Patterns, given: Mapping[str, Any], usual: Any
) -> dict[str, Any]:
    """A number of each projection of which the config says another one: under the name that all have in common where they agree."""
    values: dict[str, dict[str, Any]] = {}
    for each in fused:
        values.setdefault(".".join(each.path.split(".")[-2:]), {})[each.path] = getattr(each, of)
    found: dict[str, Any] = {}
    for name, own in values.items():
        said = {path: usual if (key := keys.first(path)) is None else given[key] for path in own}
        if said != own:
            first = next(iter(own.values()))
            found |= {name: first} if all(value == first for value in own.values()) else own
    return found


def _there(names: Sequence[str] | str | None, paths: Iterable[str]) -> Sequence[str] | str | None:
    """Those of these names that mean one of the paths; what becomes of an expression, ``store/load.py`` says."""
    if names is None or isinstance(names, str):
        return names
    return tuple(name for name in names if any(ends_with(path, name) for path in paths)) or None


# Which names of layers PEFT takes for those of experts, by the model's type (its utils/transformers_weight_conversion.py).
_TAKEN = dict.fromkeys(("mixtral", "minimax", "minimax_m2"), ("gate", "w1", "w2", "w3")) | dict.fromkeys(
    (
        "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "dots1", "ernie4_5_moe", "afmoe",
        "longcat_flash", "solar_open", "mellum", "beam", "hunyuan_v1_moe", "flex_olmo", "olmoe", "sarvam_mla", "exaone_moe", "cohere2_moe",
    ),
    ("gate", "gate_proj", "up_proj", "down_proj"),
)  # fmt: skip


def lost_in_peft(model_type: Any, targets: Sequence[str] | str | None, linear: Sequence[str]) -> str:
    """What to say of the linear layers of an adapter that PEFT would not load: it takes their names for those of experts; "" for none.

    Args:
        targets: ``target_modules`` of the file. linear: paths of the linear layers in it.
    """
    names = _TAKEN.get(model_type, ())
    if isinstance(targets, str):
        lost = [path for path in linear if path.rpartition(".")[2] in names]
    else:
        kept = [entry for entry in targets or () if not any(ends_with(entry, name) for name in names)]
        lost = [path for path in linear if not any(ends_with(path, entry) for entry in kept)]
    if not names or not lost:
        return ""
    return (
        f"PEFT 0.21 does not load {len(lost)} layers of this adapter, or none of it, such as {lost[0]}: on a {model_type} it takes their "
        "names in target_modules for those of experts; minilora loads them, and merged into the model they are right everywhere"
    )
