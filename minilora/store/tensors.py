"""What an adapter remembers of every tensor of its base model that it does not bring itself: heads, embeddings, norms, buffers.

What no checkpoint holds (a pooler, the rows of tokens that were added) is drawn at random when a model is loaded, and drawn otherwise the
next time. Kept of each tensor are its dtype, a hash, and a few values, which are compared where the dtype is another. Hashed are all
values of a tensor of up to 32,768, and of a larger one as many, evenly apart, with one at least of every row and the last one of all: a
row that was drawn anew is seen, a single number that was changed in a large tensor may not be. So it costs the reading of a few thousand
places of a tensor and not of all of it. Next file: ``store/fingerprint.py``.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import dense_shape, dense_weight, is_linear, is_quantized
from minilora.lora.bare import Around, Bare
from minilora.quant.stack import QuantizedStack

__all__ = [
    "CLOSE",
    "DENSE",
    "PACKED",
    "are_prints",
    "floats",
    "has_matrix",
    "hexadecimal",
    "other_tensors",
    "places_in",
    "printed",
    "prints",
    "same",
    "scattered",
    "values_at",
]

PACKED = "packed"
DENSE = ("float64", "float32", "float16", "bfloat16")
CLOSE = 0.9  # relative error that two bits per weight stay under; unrelated weights have 1 or more, mostly 1.4
_HASHED = 32_768  # values of a tensor, at least
_VALUES, _MORE = 8, 64  # values that are kept of a tensor in one of many layers, and of one outside of them
_PRINT = re.compile(r"([a-z0-9_]+) ([0-9a-f]{16})? ((?:[0-9a-f]{8})*)")
_Brought = Mapping[str, Sequence[int] | None]


def prints(bare: Bare, brought: _Brought, around: Around = nullcontext) -> dict[str, list[Any]]:
    """``{name: [print, rows left out]}`` of a model's tensors, JSON values.

    Args:
        brought: names that the adapter's file brings: all of a tensor (None), or some rows of it.
        around: as in ``fingerprint``.
    """
    found = {}
    for name, layer, tensor in _tensors(bare, around):
        rows = brought.get(name, ())
        if rows is not None and (said := _print(name, layer, tensor, rows)):
            found[name] = [said, sorted(rows)]
    return found


def other_tensors(bare: Bare, remembered: Mapping[str, Sequence[Any]]) -> list[str]:
    """Names of the tensors that hold something else than ``prints`` remembers."""
    return [
        name
        for name, layer, tensor in _tensors(bare)
        if name in remembered and _differs(name, layer, tensor, *remembered[name])
    ]


def printed(said: str) -> tuple[str, Tensor]:
    """Of a print: in what its values were held ("packed" for a layer that is), and the values, fp32."""
    kind, _, values = said.split(" ")
    return kind, torch.tensor(floats(values), dtype=torch.float32, device="cpu")


def places_in(name: str, count: int) -> list[int]:
    """Which of the ``count`` numbers of a tensor a print keeps, as in its flattened dense weight; the last one is among them."""
    many = _VALUES if _is_one_of_many(name) else _MORE
    return [*scattered(count, many - 1), count - 1]


def scattered(count: int, many: int) -> list[int]:
    """So many places among ``count``, far from one another."""
    return [(at * 2_654_435_761 + 12_345) % count for at in range(many)]


def are_prints(value: Any) -> bool:
    """Whether a JSON value has the form that ``prints`` gives it."""
    return isinstance(value, dict) and all(
        isinstance(one, list)
        and len(one) == 2
        and isinstance(one[0], str)
        and _PRINT.fullmatch(one[0]) is not None
        and isinstance(one[1], list)
        and all(type(row) is int and 0 <= row < 2**31 for row in one[1])
        for one in value.values()
    )


def _tensors(bare: Bare, around: Around = nullcontext) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """``(name, its module, tensor)`` of parameters and of buffers that are saved, each once, as far as they are at hand."""
    seen: set[int] = set()
    for named, module in bare.named_modules():
        path = named.replace("._orig_mod", "")  # of a part that torch.compile wrapped
        with around(named):
            for name, tensor in (*bare.parameters_of(module), *module._buffers.items()):
                packed = is_quantized(module) and name != "bias"
                if tensor is None or name in module._non_persistent_buffers_set or (packed and name != "weight"):
                    continue
                if id(tensor) not in seen and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                    seen.add(id(tensor))
                    yield f"{path}.{name}".lstrip("."), module, tensor


def _print(name: str, layer: nn.Module, tensor: Tensor, rows: Collection[int]) -> str | None:
    if is_quantized(layer) and tensor is not layer._parameters.get("bias"):
        return None if _is_one_of_many(name) else f"{PACKED}  {hexadecimal(_values(name, layer, tensor, rows))}"
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {_hash(tensor, rows)} {hexadecimal(_values(name, layer, tensor, rows)) if kind in DENSE else ''}"


def _differs(name: str, layer: nn.Module, tensor: Tensor, said: str, rows: Collection[int]) -> bool:
    before, digest, values = said.split(" ")
    packed = is_quantized(layer) and tensor is not layer._parameters.get("bias")
    now = PACKED if packed else str(tensor.dtype).removeprefix("torch.")
    if now == before != PACKED:
        return digest != _hash(tensor, rows)
    if not values or (packed and _is_one_of_many(name)):
        return False
    then, found = (
        torch.tensor(held, dtype=torch.float32, device="cpu")
        for held in (floats(values), _values(name, layer, tensor, rows))
    )
    if PACKED in (now, before):
        return float((then - found).square().sum()) > CLOSE**2 * float(then.square().sum())
    return now in DENSE and not same(then, before, found, now)


def _is_one_of_many(name: str) -> bool:
    """Whether a tensor lies in a numbered layer."""
    return any(part.isdecimal() for part in name.split("."))


def _hash(tensor: Tensor, rows: Collection[int]) -> str:
    flat = tensor.detach().reshape(-1)
    width = flat.numel() // len(tensor) if tensor.dim() > 1 and flat.numel() else 1
    step = max(1, min(width - 1, flat.numel() // _HASHED))
    # A copy: what numpy has looked at can no longer be resized, as FSDP2 does with the weights that it gathers.
    picked = flat.clone() if step == 1 else torch.cat([flat[::step], flat[-1:]])
    if rows:
        places = torch.arange(0, flat.numel(), step, device=flat.device)
        places = places if step == 1 else torch.cat([places, places.new_tensor([flat.numel() - 1])])
        picked = picked[~torch.isin(places // width, torch.tensor(sorted(rows), device=flat.device))]
    return hashlib.blake2b(picked.cpu().view(torch.uint8).numpy().data, digest_size=8).hexdigest()


def _values(name: str, layer: nn.Module, tensor: Tensor, rows: Collection[int]) -> list[float]:
    """Some values in fp32, the last one among them; of a linear layer as in ``[out, in]``, whatever it holds. 0 for rows left out."""
    matrix = has_matrix(layer) and tensor is layer._parameters.get("weight")
    shape = dense_shape(layer) if matrix else tuple(tensor.shape)
    width, count = shape[-1] if len(shape) > 1 else 1, math.prod(shape)
    if not count:
        return []
    places = places_in(name, count)
    values = values_at(layer, places) if matrix else tensor.detach().reshape(-1)[places].float().tolist()
    return [0.0 if at // width in rows else value for at, value in zip(places, values, strict=True)]


def has_matrix(layer: nn.Module) -> bool:
    """Whether this is a linear layer or a projection of experts, whose weight is looked at as ``dense_weight`` has it."""
    return is_linear(layer) or is_experts(layer)


def values_at(layer: nn.Module, places: Sequence[int]) -> list[float]:
    """Values of a weight at places of its flattened ``dense_weight``, in fp32; of a packed one only their blocks are decoded."""
    if is_quantized(layer):
        return _decoded(layer, places)
    held, found = dense_weight(layer).detach(), []
    for place in places:
        at = []
        for size in reversed(held.shape):
            place, rest = divmod(place, size)
            at.append(rest)
        found.append(float(held[tuple(reversed(at))]))
    return found


def _decoded(layer: nn.Module, places: Sequence[int]) -> list[float]:
    known: Any = layer.quantized()  # type: ignore[operator]
    whole, stack = (known.stored, known) if isinstance(known, QuantizedStack) else (known, None)
    decode, values, count = whole.decoder(), [], whole.shape.numel()
    for place in places:
        if stack is not None:  # each matrix may be filled up
            expert, rest = divmod(place, stack.shape[1] * stack.shape[2])
            place = expert * stack.each + rest
        start = place - place % whole.unit
        block = torch.empty(min(whole.unit, count - start), dtype=torch.float32, device=whole.packed.device)
        decode(start, block)
        values.append(block[place - start].item())
    return values


def same(before: Tensor, kind: str, after: Tensor, here: str) -> bool:
    """Whether dense values agree once both are rounded to the coarser of their dtypes."""
    for name in {kind, here} & {"float16", "bfloat16"}:
        dtype = getattr(torch, name)
        before, after = before.to(dtype).float(), after.to(dtype).float()
    tolerance = 2**-7 if {kind, here} == {"float16", "bfloat16"} else 0.0
    return torch.allclose(before, after, rtol=tolerance, atol=0.0, equal_nan=True)


def hexadecimal(values: Sequence[float]) -> str:
    """fp32 values, little-endian."""
    return struct.pack(f"<{len(values)}f", *values).hex()


def floats(text: str) -> tuple[float, ...]:
    """Values that ``hexadecimal`` wrote."""
    raw = bytes.fromhex(text)
    return struct.unpack(f"<{len(raw) // 4}f", raw)
