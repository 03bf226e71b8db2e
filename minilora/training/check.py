"""Whether every adapted layer is alive: one batch forward and backward tells which of them the loss depends on.

A model may hold a layer and never call it, read its weight in a way that passes the adapter by, or throw its output away. Such an adapter
trains nothing, is saved as it was drawn, and nobody notices. Next file: ``training/loop.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.lora.slot import Value, own_parameters
from minilora.lora.slots import adapters_of, unwrapped
from minilora.training.guards import check_parameters

__all__ = ["AdapterCheck", "check_adapter", "refuse_dead"]


@dataclass(frozen=True)
class AdapterCheck:
    """What one batch reached, as paths of adapted layers and copied modules.

    Attributes:
        alive: got a gradient that is not zero. zero: got one of zeros (a gate that is shut, a sequence of one token).
        unreached: were not called, while another of their kind was (an expert that saw no token, a layer that was skipped at random).
    """

    alive: tuple[str, ...]
    zero: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.alive)} adapted layers are alive"]
        for what, paths in (("got a gradient of zeros", self.zero), ("were not reached by this batch", self.unreached)):
            if paths:
                parts.append(f"{len(paths)} {what}, such as {paths[0]}")
        return "; ".join(parts)


def check_adapter(
    model: nn.Module, batch: Tensor | Mapping[str, Any] | Sequence[Any], optimizer: torch.optim.Optimizer | None = None
) -> AdapterCheck:
    """Probe the active adapter with one forward and backward on a batch, before training; gradients and weights stay as they are.

    Args:
        model: with adapters, in the mode in which it will train.
        batch: what the model is called with: keyword arguments, one tensor, or a sequence of arguments. With labels the model's own loss
            is taken, otherwise the mean square of its outputs.
        optimizer: of the loop, if it is made already; it must hold all that trains.

    Returns:
        Which layers are alive, and which this batch leaves open.

    Raises:
        StateError: an adapted layer gets no gradient, by name, with the way out; or nothing would train, as ``guards.check_parameters``.
    """
    model = unwrapped(model)
    check_parameters(model, optimizer)
    values = _trained(model)
    parameters = [p for value in values.values() for p in own_parameters(value) if p.requires_grad]

    def run() -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch) if isinstance(batch, Tensor) else model(*batch)

    with torch.enable_grad(), torch.random.fork_rng():
        loss = _loss(run())
        found = (
            torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)
        )
    gradients = {id(parameter): gradient for parameter, gradient in zip(parameters, found, strict=True)}
    return _judge(model, values, gradients, run)


def refuse_dead(model: nn.Module, run: Callable[[], Any]) -> AdapterCheck:
    """The same from the gradients of a first step, which are in ``parameter.grad`` already; ``run()`` calls the model once more, and
    only where one is missing. Raises ``StateError`` as ``check_adapter``.
    """
    values = _trained(unwrapped(model))
    gradients = {id(p): p.grad for value in values.values() for p in own_parameters(value)}
    return _judge(unwrapped(model), values, gradients, run)


def _trained(model: nn.Module) -> dict[str, nn.Module]:
    """Path to what trains there: adapters with parameters of their own, and copies. (A bias may belong to a part that a run leaves out.)"""
    adapters = adapters_of(model)
    found: dict[str, nn.Module] = {}
    for name in adapters.active:
        for path, value in adapters.named(name).items():
            if isinstance(value, nn.Module) and any(p.requires_grad for p in own_parameters(value)):
                found[path] = value
    return found


def _loss(outputs: Any) -> Tensor:
    """The model's own loss, or the sum of the mean squares of all that it returns."""
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, Tensor):
        return own.sum()
    tensors = [
        t for t in tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs) if isinstance(t, Tensor)
    ]
    parts = [t.float().square().mean() for t in tensors if t.is_floating_point() and t.requires_grad]
    if not parts:
        return torch.zeros(())
    return torch.stack(parts).sum()


def _judge(
    model: nn.Module, values: Mapping[str, nn.Module], gradients: Mapping[int, Tensor | None], run: Callable[[], Any]
) -> AdapterCheck:
    alive: list[str] = []
    zero: list[str] = []
    silent: list[str] = []
    for path, value in values.items():
        got = [g for p in own_parameters(value) if (g := gradients.get(id(p))) is not None]
        (silent if not got else alive if any(bool(g.any()) for g in got) else zero).append(path)
    if not silent:
        return AdapterCheck(tuple(alive), tuple(zero))
    called = _called({path: values[path] for path in silent}, run)
    kinds = {_kind(path) for path in (*alive, *zero)}
    dead = [path for path in silent if path in called or _kind(path) not in kinds]
    if dead:
        raise StateError(_why_dead(dead, values, called, len(values)))
    return AdapterCheck(tuple(alive), tuple(zero), tuple(silent))


def _kind(path: str) -> str:
    """The path without its numbers: layers and experts that are built alike (``layers.3.up``, ``experts.expert_3.up``)."""
    return re.sub(r"(?<![^.])\d+$|(?<![^.])([A-Za-z]+_)?\d+(?=\.)", r"\1*", path)


def _called(values: Mapping[str, nn.Module], run: Callable[[], Any]) -> set[str]:
    """Which of these the model calls."""
    found: set[str] = set()
    hooks = [value.register_forward_pre_hook(lambda *_, path=path: found.add(path)) for path, value in values.items()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _why_dead(dead: Sequence[str], values: Mapping[str, Value], called: Iterable[str], count: int) -> str:
    path = dead[0]
    how = "is called, but its output does not reach the loss" if path in called else "the model does not call it"
    rest = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
    names = sorted({each.rsplit(".", 1)[-1] for each in dead})
    alike = {each for each in values if each.rsplit(".", 1)[-1] in names} == set(dead)
    listed = ", ".join(map(repr, names if alike else dead[:3]))
    if isinstance(values[path], Adapter):
        way = f"leave it out with exclude_modules=[{listed}]"
    else:
        way = "take it out of modules_to_save, or set ensure_weight_tying=True where another module shares its weight"
    return f"{path}{rest} of {count} trained layers got no gradient from this batch: {how}, so it would train nothing; {way}"
