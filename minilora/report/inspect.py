"""Look at what an adapter learnt: how large each layer's update is, and how many directions it really uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

from torch import nn

from minilora.linear.experts.known import projections
from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import dense_shape, is_linear, is_quantized, is_router
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Around
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of, has_adapters
from minilora.lora.update import spectra_at, spectrum, update_norm, weight_norm

__all__ = ["adapters_in", "memory_table", "parameter_table", "spectra", "spectrum", "update_ratios"]


def adapters_in(model: nn.Module, adapter_name: str = "default") -> dict[str, Adapter]:
    """Path to adapter of every adapted layer. Raises ``StateError`` if there is no such adapter."""
    return {path: value for path, value in adapters_of(model).named(adapter_name).items() if isinstance(value, Adapter)}


def update_ratios(model: nn.Module, adapter_name: str = "default", *, around: Around = nullcontext) -> dict[str, float]:
    """``||delta W|| / ||W||`` (Frobenius) of every adapted layer, by path; of those that are the same for every input.

    ``around(path)``: a context in which the weights of this layer are at hand, where they are in shards.
    """
    found = {}
    for path, adapter in adapters_in(model, adapter_name).items():
        if not adapter.depends_on_input:
            with around(path):
                found[path] = update_norm(adapter) / max(weight_norm(adapter), 1e-30)
    return found


def spectra(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    ratios: Mapping[str, float] | None = None,
    most: int = 4,
    around: Around = nullcontext,
) -> dict[str, list[float]]:
    """Path to singular values of the ``most`` layers that moved most, the first of them first; of experts the one that moved most.

    Args:
        ratios: what ``update_ratios`` said of this adapter; None computes it. around: as for ``update_ratios``.
    """
    adapters = adapters_in(model, adapter_name)
    moved = update_ratios(model, adapter_name, around=around) if ratios is None else ratios
    found = {}
    for path in sorted(moved, key=moved.__getitem__, reverse=True)[:most]:
        with around(path):
            each = spectra_at(path, adapters[path])
            name = max(each, key=lambda name: float(each[name].norm()))
            found[name] = each[name].tolist()
    return found


def parameter_table(model: nn.Module) -> list[dict]:
    """Rows ``name, total, trainable, bits`` of the model's parameters by kind, packed weights counted as the weights they stand for."""
    rows: dict[str, list[float]] = {}
    counted: set[int] = set()  # a head tied to the embedding is one parameter
    adapters = adapters_of(model).slots.values() if has_adapters(model) else ()
    trained = {
        id(p) for slot in adapters for v in slot.kept.values() if isinstance(v, Adapter) for p in own_parameters(v)
    }
    for module in model.modules():
        if is_quantized(module):
            kind = "experts" if is_experts(module) else "linear layers"
            parts = [part for name, part in module.named_parameters(recurse=False) if name != "bias"]
            weights, stored = math.prod(dense_shape(module)), sum(part.nbytes for part in parts)
            _add(rows, f"{kind} ({module.format})", weights, 0, 8 * stored)
        for name, parameter in module.named_parameters(recurse=False):
            if (is_quantized(module) and name != "bias") or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            size, stored = parameter.numel(), parameter.numel() * parameter.element_size()
            _add(
                rows,
                "adapter" if id(parameter) in trained else _kind(module, name),
                size,
                size * parameter.requires_grad,
                8 * stored,
            )
    return [
        {"name": name, "total": int(total), "trainable": int(trains), "bits": bits / total}
        for name, (total, trains, bits) in rows.items()
    ]


def _kind(module: nn.Module, name: str) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings (and a head tied to them)"
    if is_experts(module) or name in projections(module):
        return "experts"
    if is_router(module) and name == "weight":
        return "routers of experts"
    return "linear layers" if is_linear(module) and name == "weight" else "norms and biases"


def _add(rows: dict[str, list[float]], name: str, *amounts: float) -> None:
    row = rows.setdefault(name, [0.0, 0.0, 0.0])
    for place, amount in enumerate(amounts):
        row[place] += amount


def memory_table(model: nn.Module, optimizer: tuple[str, int] | None = None) -> list[dict]:
    """Rows ``name, bytes, note`` of what a step holds besides activations.

    Args:
        optimizer: its name and the bytes of its state, if it is not torch's AdamW.
    """
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    note, state = optimizer or ("two moments of AdamW", 2 * trained)
    return [
        {"name": "frozen weights", "bytes": frozen, "note": "packed where quantized"},
        {"name": "adapter", "bytes": trained, "note": "fp32"},
        {"name": "gradients", "bytes": trained, "note": "of the adapter only"},
        {"name": "optimizer", "bytes": state, "note": note},
    ]
