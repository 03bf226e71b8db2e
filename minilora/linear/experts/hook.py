"""Adapters and packed codes in the place of an experts module's parameters, and back.

A module of experts reads its weights and calls nothing. While one of its projections is a layer, the module computes with ours
(``forwards.py``): through transformers' experts interface where its class has that, by a ``forward`` of its own elsewhere. With its last
layer gone, it is the module that it was. Next file: ``linear/layers.py``.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

from torch import nn

from minilora.errors import TargetError
from minilora.linear.experts import forwards
from minilora.linear.experts.known import has_projections, known_experts, note_home, owner_of, projections
from minilora.linear.experts.layers import ExpertsLinear

__all__ = ["BEFORE", "compute_with_ours", "open_experts", "put_layer", "put_projection", "refuse_strange_experts"]

_NAME = "minilora"  # ours in transformers' interface
BEFORE = "_minilora_before"  # the config or forward that a module had, and the order of its parameters


def put_projection(change: Any, home: nn.Module, name: str, layer: nn.Module) -> None:
    """Let ``home`` have ``layer`` as its projection ``name``: as its own parameter again, if that is a plain dense one.

    Args:
        change: notes every write (``lora/change.py``).
    """
    experts = owner_of(home)
    known = known_experts(experts)
    assert known is not None  # whoever has a projection is known
    if BEFORE not in vars(home):
        change.item(vars(home), BEFORE, tuple(home._parameters))
    if _is_plain(layer):
        change.drop(home._modules, name)
        held = {**home._parameters, name: layer._parameters["weight"]}
        order = [
            *(key for key in vars(home)[BEFORE] if key in held),
            *(key for key in held if key not in vars(home)[BEFORE]),
        ]
        change.put(home, "_parameters", {key: held[key] for key in order})
    else:
        change.drop(home._parameters, name)
        change.item(home._modules, name, layer)
    opened = any(each in home._modules for each in known.names)
    _compute(change, experts, opened)
    if not opened:
        change.drop(vars(home), BEFORE)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a dense projection can be the module's own parameter again: not while the layer is in shards."""
    return type(layer) is ExpertsLinear and not layer.stays and type(layer._parameters["weight"]) is nn.Parameter


def open_experts(change: Any, model: nn.Module) -> None:
    """Make layers of all dense experts of a model, and let them stay layers: what is sharded now must not move afterwards."""
    for module in model.modules():
        note_home(module)
    for module in list(model.modules()):
        for name, layer in projections(module).items():
            layer.stays = True
            put_projection(change, module, name, layer)


def _compute(change: Any, experts: nn.Module, ours: bool) -> None:
    """Let an experts module compute with our function, or with its own again."""
    known = known_experts(experts)
    if known is None or not known.forward:
        _through_interface(change, experts, ours)
    elif ours:
        forwards.out_of_graphs()
        change.item(vars(experts), "forward", functools.partial(forwards.apart, known.forward, experts))
    else:
        change.drop(vars(experts), "forward")


def compute_with_ours(change: Any, model: nn.Module) -> None:
    """Let every experts module of a model compute with ours, adapted or not: for a run on paper, where others look at values."""
    for module in model.modules():
        note_home(module)
        if known_experts(module) is not None:
            _compute(change, module, True)


def put_layer(change: Any, parent: nn.Module, name: str, layer: nn.Module) -> None:
    """Let ``parent`` have ``layer`` as its ``name``, whether that is a projection of experts or a layer as any other."""
    if has_projections(parent) and name in known_experts(owner_of(parent)).names:  # type: ignore[union-attr]
        put_projection(change, parent, name, layer)
    else:
        change.item(parent._modules, name, layer)


def _through_interface(change: Any, experts: Any, opened: bool) -> None:
    """Let transformers' interface call ours for this module alone: its ``config`` is a copy of the model's that names ours."""
    config = experts.config
    before = vars(config).get(BEFORE)
    if opened and before is None:
        register()
        own = copy.copy(config)
        vars(own).update({BEFORE: config, "_experts_implementation_internal": _NAME})
        change.put(experts, "config", own)
    elif not opened and before is not None:
        change.put(experts, "config", before)


def register() -> None:
    """Make ours known to transformers, where that is loaded."""
    found: Any = sys.modules.get("transformers.integrations.moe")
    if found is not None:
        forwards.out_of_graphs()
        found.ExpertsInterface.register(_NAME, functools.partial(forwards.apart, "routed"))


def refuse_strange_experts(path: str, home: nn.Module) -> None:
    """Raise ``TargetError`` for experts whose class or object computes otherwise than its shape says."""
    experts = owner_of(home)
    known = known_experts(experts)
    if known is None:
        return
    if "forward" in vars(experts) and BEFORE not in vars(home):
        raise TargetError(
            f"{path}: the forward of its experts ({type(experts).__name__}) was replaced, and would be lost; take it back "
            "(del module.forward) first"
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise TargetError(
            f"{path}: its experts are spread over processes (expert parallelism), where minilora does not adapt them; load the model "
            "without a distributed_config"
        )


register()
