"""What an adapter remembers of its base model, so that another one of the same shapes is refused and not silently made worse.

Kept are a hash of every parameter's name and shape (as dense weights, so that packing changes nothing) and a few values of some adapted
layers. In another dtype the values are compared after the coarser one's rounding: exactly. Of a packed base they can only be close, so a
close relative of the base (a fine-tuned one) is told apart only between dense models. Next file: ``store/save.py``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.layers import QuantLinear, dense_weight, in_out_features, is_linear
from minilora.lora.bare import Bare
from minilora.quant.quantized import decode_range

__all__ = ["differs", "fingerprint", "is_fingerprint"]

_LAYERS = 8  # layers that are sampled
_VALUES = 16  # of each
_PACKED = "packed"
_DENSE = ("float64", "float32", "float16", "bfloat16")
_CLOSE = 0.9  # relative error that two bits per weight stay under; unrelated weights have 1 or more, mostly 1.4


def fingerprint(model: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """What to remember of the bare ``model`` under adapters at ``paths``: JSON values ``parameters`` and ``samples``."""
    bare, chosen = Bare(model), sorted(paths)
    chosen = [chosen[at * len(chosen) // _LAYERS] for at in range(_LAYERS)] if len(chosen) > _LAYERS else chosen
    samples = {path: found for path in chosen if (found := _sample(bare.get_submodule(path)))}
    return {"parameters": _parameters_hash(bare), "samples": samples}


def _parameters_hash(bare: Bare) -> str:
    lines = []
    for named, module in bare.named_modules(remove_duplicate=False):
        path = named.replace("._orig_mod", "")  # of a part that torch.compile wrapped
        for name, tensor in bare.parameters_of(module):
            if not (is_linear(module) and name != "bias"):
                lines.append(f"{path}.{name} {list(tensor.shape)}")
        if is_linear(module):
            lines.append(f"{path}.weight {list(in_out_features(module)[::-1])}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sample(layer: nn.Module) -> list[str] | None:
    """``[dtype or "packed", values as hexadecimal little-endian fp32]``; None where the weight is not at hand."""
    weight = layer._parameters.get("weight")
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return None
    in_features, out_features = in_out_features(layer)
    count = in_features * out_features
    places = [(at * 2_654_435_761 + 12_345) % count for at in range(_VALUES)]
    if isinstance(layer, QuantLinear):
        return [_PACKED, _hex(_decoded(layer, places, count))]
    rows, columns = zip(*(divmod(place, in_features) for place in places), strict=True)
    values = dense_weight(layer)[torch.tensor(rows, device="cpu"), torch.tensor(columns, device="cpu")]
    kind = str(values.dtype).removeprefix("torch.")
    return [kind, _hex(values.float().tolist())] if kind in _DENSE else None


def _decoded(layer: QuantLinear, places: Sequence[int], count: int) -> list[float]:
    weight = layer.quantized()
    scales, values = weight.scales(), []
    for place in places:
        start = place - place % weight.blocksize
        block = torch.empty(min(weight.blocksize, count - start), dtype=torch.float32, device=scales.device)
        decode_range(weight, scales, start, block)
        values.append(block[place - start].item())
    return values


def _hex(values: Sequence[float]) -> str:
    return struct.pack(f"<{len(values)}f", *values).hex()


def is_fingerprint(value: Any) -> bool:
    """Whether a JSON value has the form that ``fingerprint`` gives it."""
    if not isinstance(value, dict) or value.keys() != {"parameters", "samples"}:
        return False
    parameters, samples = value["parameters"], value["samples"]
    return isinstance(parameters, str) and isinstance(samples, dict) and all(map(_is_sample, samples.values()))


def _is_sample(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in (_PACKED, *_DENSE):
        return False
    return isinstance(value[1], str) and re.fullmatch(rf"([0-9a-f]{{8}}){{{_VALUES}}}", value[1]) is not None


def differs(remembered: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """In which point two fingerprints are of different base models, in words; None if they are of one."""
    if remembered["parameters"] != found["parameters"]:
        return "its parameters have other names or shapes"
    error, size = 0.0, 0.0
    for path, (kind, values) in remembered["samples"].items():
        if path not in found["samples"]:
            continue
        here, now = found["samples"][path]
        before, after = (torch.tensor(_floats(text), dtype=torch.float32, device="cpu") for text in (values, now))
        if _PACKED in (kind, here):
            error, size = error + float((before - after).square().sum()), size + float(before.square().sum())
        elif not _same(before, kind, after, here):
            at = int((before != after).nonzero()[0])
            return f"{path}.weight holds {after[at].item():.6g} where the adapter remembers {before[at].item():.6g}"
    return "its weights are not those that were packed" if error > _CLOSE**2 * size else None


def _same(before: Tensor, kind: str, after: Tensor, here: str) -> bool:
    """Whether dense values agree once both are rounded to the coarser of their dtypes."""
    for name in {kind, here} & {"float16", "bfloat16"}:
        dtype = getattr(torch, name)
        before, after = before.to(dtype).float(), after.to(dtype).float()
    tolerance = 2**-7 if {kind, here} == {"float16", "bfloat16"} else 0.0
    return torch.allclose(before, after, rtol=tolerance, atol=0.0, equal_nan=True)


def _floats(text: str) -> tuple[float, ...]:
    raw = bytes.fromhex(text)
    return struct.unpack(f"<{len(raw) // 4}f", raw)
