"""A model without memory is filled from a file: packed weights become packed layers, the rest is dense, one after the other on its device.

Where the tensors come from, a packed folder (``hf/packed.py``) or a GGUF file (``hf/gguf_model.py``), is a ``Source``. What does not fit
the model is refused by name before a dense tensor is read. Next file: ``hf/packed.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.linear.experts.hook import put_layer
from minilora.linear.experts.layers import ExpertsLinear, QuantExperts
from minilora.linear.gguf import GGUFLinear
from minilora.linear.layers import QuantLinear, dense_shape, is_conv1d, is_linear, is_quantized
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.quant.gguf.tensor import GGUFTensor
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.stack import QuantizedStack
from minilora.training.rows import Rows

__all__ = ["Source", "fill"]


class Source(Protocol):
    """The tensors of a model by their names in it.

    Attributes:
        packed: names of the packed weights. shapes: of the dense tensors. what, said: what a message calls the tensors, and what they
            do not fit.
    """

    packed: Sequence[str]
    shapes: dict[str, tuple[int, ...]]
    what: str
    said: str

    def weight(self, name: str) -> QuantizedTensor | QuantizedStack | GGUFTensor:
        """A packed weight."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A dense tensor in ``dtype``."""


def fill(
    model: Any, source: Source, dtype: torch.dtype, device: torch.device, folder: str, rows: Rows | None = None
) -> None:
    """Put the tensors of ``source``, or of those in blocks the ``rows``, into a model on meta tensors. Raises ``CheckpointError``."""
    left = dict.fromkeys(source.shapes)
    if rows is not None:
        rows.expect(model)
    for weight in source.packed:
        path = weight.removesuffix(".weight")
        layer = _packed_layer(model, path, source.weight(weight), source, left, dtype)
        if rows is not None:
            rows.keep_packed(weight, layer)
        owner, _, name = path.rpartition(".")
        with Change() as change:
            put_layer(change, model.get_submodule(owner), name, layer.to(device))

    _refuse_unfit(model, {name: source.shapes[name] for name in left}, folder, source)
    cut = [name for name in left if rows is not None and rows.expects(name)]
    dense = {name: source.read(name, dtype).to(device) for name in left if name not in cut}
    model.load_state_dict(dense, strict=False, assign=True)
    for name in cut:
        owner, _, last = name.rpartition(".")
        mine = rows.keep(name, source.read(name, dtype).to(device))  # type: ignore[union-attr]
        model.get_submodule(owner)._parameters[last] = nn.Parameter(mine, requires_grad=False)
    model.tie_weights()
    _fill_buffers(model, device)
    model.to(device)  # what the model computes on a CPU whatever is said


def _packed_layer(
    model: nn.Module, path: str, weight: Any, source: Source, left: dict[str, None], dtype: torch.dtype
) -> nn.Module:
    """The layer at ``path`` with this weight and its bias, which leaves ``left``. Raises ``CheckpointError`` where they do not fit."""
    try:
        old: Any = Bare(model).get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{path[:200]}.weight: the model has no such layer; wrong {source.said}?") from None
    if isinstance(old, ExpertsLinear) and isinstance(weight, QuantizedStack):
        if tuple(weight.shape) != dense_shape(old):
            raise CheckpointError(f"{path}: is {list(weight.shape)}, the model wants {list(dense_shape(old))}")
        return QuantExperts.in_place_of(old, weight)
    if not is_linear(old) or isinstance(weight, QuantizedStack):
        raise CheckpointError(
            f"{path}.weight: is packed, and the model has a {type(old).__name__} there; wrong {source.said}?"
        )
    wanted = tuple(old.weight.shape[::-1] if is_conv1d(old) else old.weight.shape)
    if tuple(weight.shape) != wanted:
        raise CheckpointError(f"{path}.weight: is {list(weight.shape)}, the model wants {list(wanted)}")
    name, bias = f"{path}.bias", None
    held = list(source.shapes[name]) if name in left else None
    own = None if old.bias is None else list(old.bias.shape)
    if held != own:
        raise CheckpointError(f"{name}: is {held}, the model wants {own}; {source.what} do not fit {source.said}")
    if held is not None:
        del left[name]
        bias = nn.Parameter(source.read(name, dtype), requires_grad=False)
    kind = GGUFLinear if isinstance(weight, GGUFTensor) else QuantLinear
    return kind(weight, bias, type(old) if is_conv1d(old) else None)


def _refuse_unfit(model: Any, shapes: dict[str, tuple[int, ...]], folder: str, source: Source) -> None:
    """Raise ``CheckpointError`` for dense tensors that are too many, too few or of another shape, before one of them is read."""
    state = model.state_dict()
    for name, own in state.items():
        if name in shapes and shapes[name] != tuple(own.shape):
            wrong = f"is {list(shapes[name])}, the model wants {list(own.shape)}"
            raise CheckpointError(f"{folder}: {name} {wrong}; {source.what} do not fit {source.said}")
    packed = {path for path, module in model.named_modules() if is_quantized(module)}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [n for n in state if n not in shapes and n.rpartition(".")[0] not in packed and n not in tied]
    unexpected = [name for name in shapes if name not in state]
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unexpected"
        raise CheckpointError(f"{folder}: {what}; {source.what} do not fit {source.said}")


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Rotary tables and the like are computed, not stored: make again what is still on the meta device."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            if hasattr(module, "scalar_embed_scale"):  # Gemma's embedding, which is no function of the config alone
                module._buffers["embed_scale"] = torch.tensor(module.scalar_embed_scale, device=device)
                continue
            config = getattr(module, "config", None) or model.config
            fresh = type(module)(config)
            for name, buffer in fresh._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
            for name, value in vars(fresh).items():
                if isinstance(value, Tensor):
                    setattr(module, name, value.to(device))
    every = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in every if tensor.is_meta and device.type != "meta"]
    if left:
        raise CheckpointError(f"{left[0]}: is neither in the file nor made by the model")
