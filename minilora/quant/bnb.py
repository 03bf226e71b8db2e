"""A quantized weight as bitsandbytes stores it, and back. What it has no layout for: ``quant/on_disk.py``.

Beside ``W`` (codes, first weight in the high nibble) lie ``W.absmax``, ``W.quant_map``, with double quantization ``W.nested_absmax``
and ``W.nested_quant_map``, and ``W.quant_state.bitsandbytes__nf4``, a JSON object as bytes. Nothing of a file is believed: every size
is compared before a weight is built from it. bitsandbytes need not be installed. Next file: ``quant/on_disk.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError, QuantizationError
from minilora.files.parse import parse_json
from minilora.quant.codebooks import CODEBOOKS, OF_BITSANDBYTES, Codebook, codebook, dynamic_map
from minilora.quant.finite import is_finite
from minilora.quant.nested import NESTED_BLOCKSIZE
from minilora.quant.quantized import QuantizedTensor

__all__ = [
    "from_bitsandbytes",
    "is_state",
    "laid_out",
    "named_state",
    "restored",
    "state_content",
    "storable",
    "table_of",
    "to_bitsandbytes",
    "weight_of",
]

_STATE = ".quant_state.bitsandbytes__"
STATES = (_STATE, ".quant_state.minilora__")  # the second one's layout is in ``quant/on_disk.py``
_BOOKS = {name: CODEBOOKS[name] for name in OF_BITSANDBYTES}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = tuple(_DTYPES.values())
_STORAGES = (torch.uint8, *_FLOATS)  # bnb_4bit_quant_storage
_PARTS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
)  # and the state: what is appended to a weight's name
_LONGEST_STATE = 10_000  # bytes of JSON; bitsandbytes writes about 200


def is_state(name: str) -> bool:
    """Whether this tensor's name marks a packed weight: the file decides, weight by weight, not the config."""
    return any(mark in name for mark in STATES)


def weight_of(name: str) -> str:
    """The weight that a tensor of this name would belong to; the name itself where nothing is appended to it."""
    for mark in STATES:
        name = name.partition(mark)[0]
    return next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), name)


def storable(format: str | Codebook, blocksize: int) -> bool:
    """Whether bitsandbytes has this format at this blocksize."""
    book = codebook(format)
    return _BOOKS.get(book.name) == book and 64 <= blocksize <= 4096


def to_bitsandbytes(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Tensors by what is appended to the weight's name ("" for the codes).

    Raises:
        QuantizationError: the format or shape is not one that bitsandbytes has.
    """
    kind = weight.book.name
    if not storable(weight.book, weight.blocksize) or len(weight.shape) not in (2, 3):
        raise QuantizationError(
            f"{kind}, {len(weight.shape)}-D, blocksize {weight.blocksize}: bitsandbytes cannot store that; it stores nf4 and fp4, 2-D or "
            "3-D, blocksize 64 to 4096"
        )
    return laid_out(weight, _STATE, {})


def laid_out(weight: QuantizedTensor, mark: str, more: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a weight, with ``mark`` before its format in the name of the state, which says ``more`` beside what it always does."""
    kind = weight.book.name
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": weight.blocksize,
        "dtype": next((name for name, kind in _DTYPES.items() if kind == weight.dtype), "float32"),
        "shape": list(weight.shape),
        **more,
    }
    tensors = {"": weight.packed.reshape(-1, 1), ".absmax": weight.absmax, ".quant_map": weight.book.table()}
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(weight.nested_offset),
        }
        tensors |= {".nested_absmax": weight.nested_absmax, ".nested_quant_map": dynamic_map()}
    tensors[f"{mark}{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """The inverse, for any ``quant_storage`` dtype.

    Args:
        tensors: by what is appended to the weight's name, as ``to_bitsandbytes`` returns. name: the weight's, for messages.

    Raises:
        CheckpointError: something is missing, of a wrong size, or not what bitsandbytes writes; the message names it.
    """
    kind, state = _read_state(tensors, name)
    book = _BOOKS[kind]
    if not torch.equal(table_of(tensors, name, 16), book.table()):
        raise CheckpointError(f"{name}.quant_map: is not the table of {kind}; the file was not written by bitsandbytes")
    return restored(tensors, name, book, state)


def table_of(tensors: Mapping[str, Tensor], name: str, count: int) -> Tensor:
    """The levels that are stored beside a weight, so many of them, in fp32. Raises ``CheckpointError`` for another number."""
    table = _wanted(tensors, ".quant_map", name)
    _sized(table, count, name + ".quant_map", "levels")
    return table.float().cpu().reshape(-1)


def restored(tensors: Mapping[str, Tensor], name: str, book: Codebook, state: Mapping[str, Any]) -> QuantizedTensor:
    """The weight of a state that ``state_content`` has checked, in codes of ``book``. Raises as ``from_bitsandbytes``."""
    shape = torch.Size(state["shape"])
    blocks = math.ceil(shape.numel() / state["blocksize"])
    packed = _of(_STORAGES, _wanted(tensors, "", name), name).contiguous().view(-1).view(torch.uint8)
    _sized(packed, math.ceil(shape.numel() * book.bits / 8), name, "bytes of codes")
    absmax = _wanted(tensors, ".absmax", name).reshape(-1)
    _sized(absmax, blocks, name + ".absmax", "scales")
    if shape[-1] * book.bits % 8 == 0:
        packed = packed.view(*shape[:-1], shape[-1] * book.bits // 8)
    dtype = _DTYPES[state["dtype"]]
    if "nested_blocksize" not in state:
        scales = _finite(_of(_FLOATS, absmax, name + ".absmax").float(), name + ".absmax")
        return QuantizedTensor(packed, scales, shape, dtype, book, state["blocksize"])
    nested = _of(_FLOATS, _wanted(tensors, ".nested_absmax", name), name + ".nested_absmax").float().reshape(-1)
    _sized(nested, math.ceil(blocks / NESTED_BLOCKSIZE), name + ".nested_absmax", "scales of scales")
    table = _wanted(tensors, ".nested_quant_map", name)
    if table.numel() != 256 or not torch.equal(table.float().cpu(), dynamic_map()):
        raise CheckpointError(
            f"{name}.nested_quant_map: is not bitsandbytes' table of 256 levels; it was not written by bitsandbytes"
        )
    _of((torch.uint8,), absmax, name + ".absmax")
    offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device="cpu")
    _finite(nested.abs() + offset.abs(), name + ".nested_absmax")  # of both each scale is made
    return QuantizedTensor(packed, absmax, shape, dtype, book, state["blocksize"], nested, offset)


def _read_state(tensors: Mapping[str, Tensor], name: str) -> tuple[str, dict[str, Any]]:
    """Kind and content of the JSON object, every field of it checked."""
    kind, where = named_state(tensors, name, _STATE)
    if kind not in _BOOKS:
        raise CheckpointError(f"{where}: is no quant_state of nf4 or fp4; wanted JSON as bytes")
    return kind, state_content(tensors, name, _STATE, kind)


def named_state(tensors: Mapping[str, Tensor], name: str, mark: str) -> tuple[str, str]:
    """The format in the name of a weight's one state, and that name. Raises ``CheckpointError`` if there is not one."""
    found = [suffix for suffix in tensors if suffix.startswith(mark)]
    if len(found) != 1:
        raise CheckpointError(f"{name}: has {len(found)} quant_state tensors; wanted one")
    return found[0].removeprefix(mark), name + found[0]


def state_content(tensors: Mapping[str, Tensor], name: str, mark: str, kind: str) -> dict[str, Any]:
    """The JSON object of the state of this format, every field of it checked that both layouts have."""
    raw, where = tensors[mark + kind], f"{name}{mark}{kind}"
    if raw.dtype != torch.uint8 or raw.numel() > _LONGEST_STATE:
        raise CheckpointError(f"{where}: is no quant_state of {kind[:64]}; wanted JSON as bytes")
    try:
        state = parse_json(bytes(raw.flatten().tolist()))
    except ValueError as error:
        raise CheckpointError(f"{where}: is not JSON ({error}); the file is damaged, copy it again") from None
    if not _is_state(state, kind):
        raise CheckpointError(
            f"{where}: {str(state)[:120]} is not a state that minilora reads; wanted 2-D or 3-D, blocksize a power of two from 32 to 4096, "
            "nested by 256 in float32"
        )
    return state


def _is_state(state: Mapping[str, Any], kind: str) -> bool:
    """Whether this is a state as bitsandbytes writes it: nothing in it means more or less than it says."""
    size, shape, dtype = state.get("blocksize"), state.get("shape"), state.get("dtype")
    if not (isinstance(shape, list) and len(shape) in (2, 3) and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        return False
    if type(size) is not int or not 32 <= size <= 4096 or size & (size - 1):
        return False
    if not isinstance(dtype, str) or dtype not in _DTYPES or state.get("quant_type") != kind:
        return False
    if "nested_blocksize" not in state:
        return True
    offset = state.get("nested_offset")
    whole = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]
    nested = type(state["nested_blocksize"]) is int and state["nested_blocksize"] == NESTED_BLOCKSIZE
    return whole and nested and state.get("nested_dtype", "float32") == "float32"


def _wanted(tensors: Mapping[str, Tensor], suffix: str, name: str) -> Tensor:
    if suffix not in tensors:
        raise CheckpointError(f"{name}{suffix}: is missing, although the weight is packed; the file is incomplete")
    return tensors[suffix]


def _of(kinds: tuple[torch.dtype, ...], tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in kinds:
        raise CheckpointError(
            f"{name}: is {tensor.dtype}; wanted {' or '.join(str(kind).removeprefix('torch.') for kind in kinds)}"
        )
    return tensor


def _sized(tensor: Tensor, count: int, name: str, what: str) -> None:
    if tensor.numel() != count:
        raise CheckpointError(
            f"{name}: holds {tensor.numel()} {what}, its quant_state wants {count}; the file is damaged"
        )


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not is_finite(tensor):
        raise CheckpointError(f"{name}: holds NaN or infinity; quantize the dense model again")
    return tensor
