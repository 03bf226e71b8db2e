"""Which modules are experts, and how each keeps its weights: a table by class, for what says nothing of itself.

Most classes of transformers carry marks (``use_experts_implementation`` sets ``is_transposed``, ``has_gate``, ``has_bias`` on each module);
those are read. The others stand here by the name of their class. What is in neither is no experts module: a bare 3-D parameter of
it is left alone, and told of. Next file: ``linear/experts/routers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.linear.experts.layers import ExpertsLinear

__all__ = ["BY_NAME", "Known", "declared", "has_projections", "known_experts", "note_home", "owner_of", "projections"]


@dataclass(frozen=True)
class Known:
    """How a class of experts keeps its weights.

    Attributes:
        names: its projections, in the order in which it declares them.
        transposed: those that it keeps ``[E, in, out]``; all others are ``[E, out, in]``.
        forward: the function of ``forwards.py`` that computes it; "" where transformers' interface calls ours.
        home: the part that holds the parameters; "" for the module itself.
        flat: the attribute that counts the experts where the parameters are ``[E * rows, columns]``; "" where they are 3-D.
        marked: whether the module says itself that it is transposed, which PEFT goes by.
    """

    names: tuple[str, ...]
    transposed: frozenset[str] = frozenset()
    forward: str = ""
    home: str = ""
    flat: str = ""
    marked: bool = False


BY_NAME: dict[str, Known] = {
    "Llama4TextExperts": Known(("gate_up_proj", "down_proj"), frozenset({"gate_up_proj", "down_proj"}), "llama4"),
    "DbrxExperts": Known(("w1", "v1", "w2"), frozenset({"w2"}), "dbrx", "mlp", "moe_num_experts"),
    "JetMoeParallelExperts": Known(("weight",), forward="jetmoe"),
    "LongcatFlashExperts": Known(("gate_up_proj", "down_proj"), forward="longcat"),
    "Step3p7Experts": Known(("gate_up_proj", "down_proj"), forward="routed"),
    "InklingSharedExperts": Known(("gate_proj", "up_proj", "down_proj"), forward="shared"),
}
_MARKS = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "_is_expert_parallel")
_CACHE, _OWNER = "_minilora_projections", "_minilora_experts"
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "down_proj", "w2", "weight")


def known_experts(module: nn.Module) -> Known | None:
    """How this module keeps the weights of experts; None where it is no such module."""
    own = vars(module)
    if all(mark in own for mark in _MARKS):
        names = ("gate_up_proj" if own["has_gate"] else "up_proj", "down_proj")
        return Known(names, frozenset(names if own["is_transposed"] else ()), marked=True)
    return BY_NAME.get(type(module).__name__)


def declared(names: Any) -> list[str]:
    """Names of projections of one module in the order in which classes declare them; unknown ones last, by name."""
    places = {name: at for at, name in enumerate(_DECLARED)}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))


def note_home(module: nn.Module) -> None:
    """Let the part that holds a module's weights know whose they are, where that is another module."""
    known = BY_NAME.get(type(module).__name__)
    if known is not None and known.home and (part := module._modules.get(known.home)) is not None:
        vars(part)[_OWNER] = module


def owner_of(home: nn.Module) -> nn.Module:
    """The experts module that the projections in ``home`` belong to: itself, unless ``note_home`` said otherwise."""
    found = vars(home).get(_OWNER, home)
    return found if isinstance(found, nn.Module) and found._modules.get(_home(found)) is home else home


def _home(module: nn.Module) -> str:
    known = known_experts(module)
    return known.home if known is not None else ""


def projections(home: nn.Module) -> dict[str, ExpertsLinear]:
    """The dense projections that a module holds as parameters, by name, as layers over the same memory; one layer as long as it is there.

    The layers lie beside the module and not in it, so that its state dict is its own.
    """
    owner = owner_of(home)
    known = known_experts(owner)
    if known is None or (known.home and owner is home):
        return {}
    cache: dict[str, ExpertsLinear] = vars(home).setdefault(_CACHE, {})
    found = {}
    for name in known.names:
        weight = home._parameters.get(name)
        if weight is None or weight.dim() != (2 if known.flat else 3) or not weight.is_floating_point():
            continue
        if name not in cache or cache[name]._parameters["weight"] is not weight:
            count = getattr(home, known.flat) if known.flat else len(weight)
            sizes = (count, weight.shape[0] // count, weight.shape[1]) if known.flat else tuple(weight.shape)
            turned = name in known.transposed
            crossed = turned and not (known.marked or known.flat)
            cache[name] = ExpertsLinear(weight, turned, sizes, crossed)  # type: ignore[arg-type]
        found[name] = cache[name]
    return found


def has_projections(home: nn.Module) -> bool:
    """Whether this module holds projections of experts, whatever stands in their places."""
    known = known_experts(owner_of(home))
    return known is not None and any(name in home._parameters or name in home._modules for name in known.names)
