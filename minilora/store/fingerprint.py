"""What an adapter remembers of its base model, so that another one of the same shapes is refused and not silently made worse.

Kept are a hash of every parameter's name and shape (as dense weights, so that packing changes nothing), a few values of some adapted
layers, and a print of every tensor that the adapter does not bring itself (``tensors.py``). In another dtype values are compared after
the coarser one's rounding: exactly. Of a packed base they can only be close, so a close relative of the base (a fine-tuned one) is told
apart only between dense models. Next file: ``store/save.py``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.layers import dense_shape, dense_weight, is_quantized, stored_weight
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Around, Bare
from minilora.lora.slot import Value
from minilora.lora.variants.tokens import TokenRows
from minilora.store.tensors import (
    CLOSE,
    DENSE,
    PACKED,
    are_prints,
    floats,
    has_matrix,
    hexadecimal,
    other_tensors,
    prints,
    same,
    scattered,
    values_at,
)

__all__ = ["ROUNDED", "brought_by", "differs", "fingerprint", "is_fingerprint", "sampled", "strange_tensors"]

_LAYERS = 8  # layers that are sampled
_VALUES = 16  # of each
_SHOWN = 3  # names in a message
ROUNDED = 2**-7  # relative error of two roundings to bfloat16


def fingerprint(
    model: nn.Module,
    paths: Sequence[str],
    brought: Mapping[str, Sequence[int] | None] | None = None,
    around: Around = nullcontext,
) -> dict[str, Any]:
    """What to remember of the bare ``model`` under adapters at ``paths``: JSON values ``parameters`` and ``samples``.

    With ``brought``, what the adapter's file brings itself (``brought_by``), the prints of all other ``tensors`` too. ``around(path)``: a
    context in which the weights of this layer are at hand, where they are in shards.
    """
    bare, chosen = Bare(model), sorted(paths)
    chosen = [chosen[at * len(chosen) // _LAYERS] for at in range(_LAYERS)] if len(chosen) > _LAYERS else chosen
    samples = {}
    for path in chosen:
        with around(path):
            if found := _sample(bare.get_submodule(path)):
                samples[path] = found
    whole = {"parameters": _parameters_hash(bare), "samples": samples}
    return whole if brought is None else {**whole, "tensors": prints(bare, brought, around)}


def brought_by(values: Mapping[str, Value]) -> dict[str, Sequence[int] | None]:
    """Names of the bare model's tensors that an adapter's values stand for: all of one (None), or some of its rows."""
    found: dict[str, Sequence[int] | None] = {}
    for path, value in values.items():
        if isinstance(value, TokenRows):
            found[f"{path}.weight"] = value.token_indices.tolist()
        elif isinstance(value, nn.Parameter):
            found[path] = None
        elif not isinstance(value, Adapter):
            found |= {f"{path}.{name}": None for name in value.state_dict()}
    return found


def strange_tensors(model: nn.Module, remembered: Mapping[str, Any]) -> str | None:
    """Which tensors of the bare ``model`` are not those that a fingerprint remembers, in words; None if all are."""
    names = other_tensors(Bare(model), remembered.get("tensors", {}))
    if not names:
        return None
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    held = "holds" if len(names) == 1 else "hold"
    return (
        f"{', '.join(names[:_SHOWN])}{more} {held} other values (what a checkpoint does not hold is drawn at random: save the base model "
        "too, and load that one)"
    )


def _parameters_hash(bare: Bare) -> str:
    lines = []
    for named, module in bare.named_modules(remove_duplicate=False):
        path = named.replace("._orig_mod", "")  # of a part that torch.compile wrapped
        for name, tensor in bare.parameters_of(module):
            if not (has_matrix(module) and name != "bias"):
                lines.append(f"{path}.{name} {list(tensor.shape)}")
        if has_matrix(module):
            lines.append(f"{path}.weight {list(dense_shape(module))}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sample(layer: nn.Module) -> list[str] | None:
    """``[dtype or "packed", values as hexadecimal little-endian fp32]``; None where the weight is not at hand."""
    weight = stored_weight(layer)
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return None
    count = math.prod(dense_shape(layer))
    places = sampled(count)
    kind = PACKED if is_quantized(layer) else str(dense_weight(layer).dtype).removeprefix("torch.")
    return [kind, hexadecimal(values_at(layer, places))] if kind in (PACKED, *DENSE) else None


def sampled(count: int) -> list[int]:
    """Which of the ``count`` numbers of a layer's flattened dense weight a sample keeps."""
    return scattered(count, _VALUES)


def is_fingerprint(value: Any) -> bool:
    """Whether a JSON value has the form that ``fingerprint`` gives it."""
    if not isinstance(value, dict) or value.keys() - {"tensors"} != {"parameters", "samples"}:
        return False
    if not are_prints(value.get("tensors", {})):
        return False
    parameters, samples = value["parameters"], value["samples"]
    return isinstance(parameters, str) and isinstance(samples, dict) and all(map(_is_sample, samples.values()))


def _is_sample(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in (PACKED, *DENSE):
        return False
    return isinstance(value[1], str) and re.fullmatch(rf"([0-9a-f]{{8}}){{{_VALUES}}}", value[1]) is not None


def differs(remembered: Mapping[str, Any], found: Mapping[str, Any], own_base: bool = False) -> str | None:
    """In which point two fingerprints are of different base models, in words; None if they are of one.

    ``own_base``: of an adapter that packed its base itself, and makes up for the error of just these codes (LoftQ). Beside another packing
    of the same weights it would be wrong, so packed values have to agree but for a rounding to bfloat16.
    """
    if remembered["parameters"] != found["parameters"]:
        return "its parameters have other names or shapes"
    error, size = 0.0, 0.0
    for path, (kind, values) in remembered["samples"].items():
        if path not in found["samples"]:
            continue
        here, now = found["samples"][path]
        before, after = (torch.tensor(floats(text), dtype=torch.float32, device="cpu") for text in (values, now))
        if own_base and kind == here == PACKED and not torch.allclose(before, after, rtol=ROUNDED, atol=0.0):
            return f"{path} is packed otherwise than the adapter packed it; load it onto the dense model, or onto its own packed base"
        if PACKED in (kind, here):
            error, size = error + float((before - after).square().sum()), size + float(before.square().sum())
        elif not same(before, kind, after, here):
            at = int((before != after).nonzero()[0])
            return f"{path}.weight holds {after[at].item():.6g} where the adapter remembers {before[at].item():.6g}"
    return "its weights are not those that were packed" if error > CLOSE**2 * size else None
