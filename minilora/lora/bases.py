"""Which layers can stand under an adapter, or be packed: those that are nothing but their weight.

An adapter adds to ``x W^T``, a merge changes ``W``, packing replaces it. All three are right only where the layer computes
``x W^T + b`` (an embedding: its scaled rows; a convolution: ``W`` over patches) and nothing else. A class with a ``forward`` of its own
is tried on a few numbers; a table that is rewritten while it is read, a weight that is computed or lies elsewhere, are refused by name
before anything has changed. Next file: ``lora/match.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import StateError, TargetError
from minilora.linear.convolution import convolve, is_convolution, of_channels
from minilora.linear.experts.layers import is_experts
from minilora.linear.frozen import PackedLinear
from minilora.linear.layers import (
    dense_weight,
    embed_scale,
    is_attention_output,
    is_foreign,
    is_plain,
    is_router,
    kind_of,
    stored_weight,
)
from minilora.lora.adapter import Adapter
from minilora.lora.architectures import READ_BY_PARENT
from minilora.lora.slots import has_adapters

__all__ = [
    "is_more_than_its_weight",
    "is_read_by_parent",
    "refuse_nested",
    "refuse_not_a_weight",
    "refuse_odd_attention",
    "refuse_to_replace",
]

_IS = {
    "linear": "x W^T + b",
    "embedding": "an embedding's rows",
    "convolution": "a convolution",
    "attention": "torch's attention",
    "experts": "x W^T for each expert",
    "router": "a router",
}
_KNOWN = (
    PackedLinear.forward,
    nn.Embedding.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
    nn.MultiheadAttention.forward,
)

# What a layer may hold: of a packed one the scales too, of an embedding the factor that ``embed_scale`` reads (a buffer in Gemma 3).
_OWN = {"weight", "bias", "absmax", "nested_absmax", "nested_offset", "embed_scale"}
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}  # of the largest value; bf16 6e-2


def refuse_not_a_weight(path: str, layer: nn.Module) -> None:
    """Raise ``TargetError`` for a layer that is more, or other, than its weight."""
    if not isinstance(stored_weight(layer), Tensor):
        raise TargetError(
            f"{path}: its weight is computed (a parametrization, weight norm or pruning), so an adapter would not last; make it a plain "
            "parameter first, such as with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if is_router(layer) and not stored_weight(layer).is_floating_point():
        kind = str(stored_weight(layer).dtype).removeprefix("torch.")
        raise TargetError(
            f"{path}: the weight of a router is {kind}, packed, and an update cannot be added to it; give the dense model, or leave it out "
            "(exclude_modules)"
        )
    if more := _more_of(layer):
        raise TargetError(
            f"{path}: {type(layer).__name__} holds {more[0]!r} beside its weight and bias, which would be lost to the model; leave it out "
            "(exclude_modules)"
        )
    if _is_offloaded(layer):
        raise TargetError(
            f"{path}: its weight is offloaded (accelerate keeps it elsewhere until the layer is called); load the model without offloading"
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise TargetError(
            f"{path}: max_norm={layer.max_norm:g} rewrites the table while it is read; renormalize it once and set max_norm=None"
        )
    if is_more_than_its_weight(layer):
        what = _IS[kind_of(layer) or "linear"]
        raise TargetError(
            f"{path}: {type(layer).__name__} computes something else than {what} in its own forward, so an update of the weight would not "
            "mean what it should; leave it out (exclude_modules)"
        )


def refuse_odd_attention(path: str, layer: nn.MultiheadAttention, output: nn.Module) -> None:
    """Raise ``TargetError`` for an attention that has no single input projection, or another layer as its output projection."""
    if not layer._qkv_same_embed_dim:
        raise TargetError(
            f"{path}: Only same embed for query/key/value is supported as of now for MultiheadAttention; kdim={layer.kdim} and "
            f"vdim={layer.vdim} mean three input projections, which have no adapter; leave it out (exclude_modules)"
        )
    if not is_attention_output(output):
        kind = type(output).__name__
        raise TargetError(
            f"{path}: its out_proj is a {kind}, not the layer that torch gives it; leave it out (exclude_modules)"
        )


def _more_of(layer: nn.Module) -> list[str]:
    """Names of what a layer holds beside its weight and bias (of an attention: beside what torch gives it)."""
    if isinstance(layer, nn.MultiheadAttention) or is_foreign(layer) or is_router(layer):
        return []
    return sorted((layer._parameters.keys() | layer._buffers.keys() | layer._modules.keys()) - _OWN)


def refuse_to_replace(path: str, layer: nn.Module) -> None:
    """Raise ``TargetError`` for a layer whose object has a ``forward`` of its own, which a layer in its place would not have."""
    if (
        "forward" in layer.__dict__ and "_hf_hook" not in layer.__dict__
    ):  # accelerate's only moves tensors between devices
        raise TargetError(
            f"{path}: this object's forward was replaced, and would be lost with the layer; take it back (del layer.forward) first"
        )


def is_more_than_its_weight(layer: nn.Module) -> bool:
    """Whether calling this layer is something else than its product (an embedding: its rows), tried where its class does not say."""
    if is_foreign(layer) or is_experts(layer) or is_router(layer):
        return False
    if type(layer).__call__ is not nn.Module.__call__ or _more_of(layer):
        return True
    if "forward" not in layer.__dict__ and (is_plain(layer) or type(layer).forward in _KNOWN):
        return False
    if isinstance(layer, nn.MultiheadAttention):  # too much in it to try it
        return True
    weight = stored_weight(layer)
    if weight is None or weight.is_meta:  # nothing to try it on
        return False
    probe = copy.copy(layer)  # its weights are the layer's; the layer itself is not touched
    probe.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            x, wanted = _trial(probe)
            found: Any = probe.forward(x)
            return not _same(found, wanted)
    except Exception:  # whatever it wants, it is no product of x alone
        return True


def _trial(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if is_convolution(layer):
        sizes = [2 * reach * (size - 1) + 3 for reach, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        x = _numbers(layer.weight, 1, layer.in_channels, *sizes)
        plain = convolve(layer, x, layer.weight, layer.groups)
        return x, plain if layer.bias is None else plain + of_channels(layer, layer.bias)
    weight = dense_weight(layer)
    if isinstance(layer, nn.Embedding):
        rows = sorted({0, 1 % len(weight), len(weight) // 2, len(weight) - 1})
        ids = torch.tensor([rows], device=weight.device)
        return ids, weight[ids] * embed_scale(layer)
    x = _numbers(weight, 2, weight.shape[1])
    bias: Any = layer.bias
    return x, F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def _numbers(weight: Tensor, *shape: int) -> Tensor:
    """Some numbers of the weight's dtype and device."""
    return torch.arange(math.prod(shape), device=weight.device, dtype=torch.float32).view(shape).cos().to(weight.dtype)


def _same(found: Any, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    error, size = (found.double() - wanted.double()).abs().max(), wanted.double().abs().max()
    return bool(error <= _CLOSE.get(wanted.dtype, 6e-2) * size)


def _is_offloaded(layer: nn.Module) -> bool:
    hook, weight = layer.__dict__.get("_hf_hook"), stored_weight(layer)
    hooks = getattr(hook, "hooks", (hook,))
    return bool(weight is not None and weight.is_meta and hook) or any(
        getattr(each, "offload", False) for each in hooks
    )


def is_read_by_parent(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether this layer is one of those whose weight the model is known to read instead of calling the layer."""
    parent, _, attr = path.rpartition(".")
    kind = type(modules[parent]).__name__ if parent in modules else ""
    return any(kind.endswith(ending) and attr in names for ending, names in READ_BY_PARENT.items())


def refuse_nested(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ``StateError`` where a part of the bare model carries adapters that belong to another record than the model's own."""
    inside = [(path, module) for path, module in modules if path]
    for path, module in inside:
        if isinstance(module, Adapter):
            raise StateError(
                f"{path} carries an adapter already, which belongs to another model than this one; work on that model, or unload it first"
            )
    if found := [path for path, module in inside if has_adapters(module)]:
        raise StateError(f"{found[0]} carries adapters of its own; work on it alone, or unload(model.{found[0]}) first")
