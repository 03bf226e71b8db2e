"""A frozen linear layer whose weight is packed codes and scales: ``QuantLinear``. Next file: ``linear/gguf.py``."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.frozen import PackedLinear, floats, refuse_other_codes, stored
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import QuantizedTensor

__all__ = [
    "QuantLinear",
    "calls_only_forward",
    "hooks_of",
    "is_conv1d",
    "rows_of",
    "take_attributes",
    "take_hooks",
]

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
_FIELDS = {
    "nf",
    "nx",
    "book",
    "blocksize",
    "dtype",
    "kind",
    "double_quant",
    "conv1d",
    "absmax",
    "nested_absmax",
    "nested_offset",
}


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D``, known by its name and shape so that transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module.weight, "dim", int)() == 2


def rows_of(layer: nn.Module) -> Tensor:
    """The weight of a dense layer as ``[out, in]``, detached, over the same memory."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if is_conv1d(layer) else weight


class QuantLinear(PackedLinear):
    """A frozen linear layer whose weight is stored as packed codes and scales (QLoRA section 3). fp32 scales are kept as their bytes.

    Attributes: as ``PackedLinear``, and
        codes: uint8 ``[out, in * bits / 8]`` where a row divides evenly, else flat.
        absmax: uint8; ``[blocks, 4]`` fp32 bytes, or ``[blocks]`` 8-bit codes with double quantization.
        nested_absmax, nested_offset: uint8 fp32 bytes ``[n, 4]``, or None.
        dtype: of the weight before it was packed.
    """

    def __init__(
        self, weight: QuantizedTensor, bias: nn.Parameter | None = None, conv1d: type[nn.Module] | None = None
    ) -> None:
        super().__init__(weight, bias, conv1d)
        self.book, self.blocksize = weight.book, weight.blocksize
        self.double_quant = weight.nested_absmax is not None
        nested, offset = weight.nested_absmax, weight.nested_offset
        self.absmax = stored(weight.absmax)
        self.nested_absmax = None if nested is None else stored(nested)
        self.nested_offset = None if offset is None else stored(offset)

    @classmethod
    def from_linear(
        cls, layer: nn.Module, config: QuantConfig, name: str = "weight", importance: Tensor | None = None
    ) -> QuantLinear:
        """Quantize a ``Linear`` or ``Conv1D``; bias and hooks are carried over as they are. Arguments and errors as ``quantize``."""
        kind = type(layer) if is_conv1d(layer) else None
        packed = cls(quantize(rows_of(layer), config, name, importance), layer.bias, kind)  # type: ignore[arg-type]
        take_hooks(packed, hooks_of(layer))
        take_attributes(packed, layer)
        return packed

    @property
    def format(self) -> str:
        """The codebook's name."""
        return self.book.name

    def quantized(self) -> QuantizedTensor:
        """The weight as a ``QuantizedTensor`` over the same memory."""
        codes = refuse_other_codes(self._parameters["weight"])
        absmax = self.absmax if self.double_quant else floats(self.absmax)
        nested = None if self.nested_absmax is None else floats(self.nested_absmax)
        offset = None if self.nested_offset is None else floats(self.nested_offset)
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(codes, absmax, shape, self.dtype, self.book, self.blocksize, nested, offset)

    def meaning(self) -> dict[str, Any]:
        """Format, levels, blocksize, double quantization, shape."""
        return format_of(self, [self.out_features, self.in_features])


def format_of(layer: Any, shape: list[int]) -> dict[str, Any]:
    """What the bytes of a packed layer mean: JSON values."""
    levels = hashlib.sha256(repr(layer.book.levels).encode()).hexdigest()[:16]
    known = {"format": layer.book.name, "levels": levels, "blocksize": layer.blocksize}
    return known | {"double_quant": layer.double_quant, "shape": shape}


def hooks_of(layer: nn.Module) -> dict[str, Any]:
    """The dictionaries that hold the hooks on calls of this layer: the very objects, so that a handle still removes its hook."""
    return {name: layer.__dict__[name] for name in _HOOKS}


def calls_only_forward(module: nn.Module) -> bool:
    """Whether ``module(x)`` is ``type(module).forward(module, x)``: no hook, here or on all modules, and no forward of the object's own."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and "forward" not in own and not nn.modules.module._has_any_global_hook()


def take_hooks(new: nn.Module, hooks: dict[str, Any] | None) -> None:
    """Give ``new`` the hooks of the layer whose place it takes; None for no hooks at all."""
    own = hooks if hooks is not None else {name: OrderedDict() for name in _HOOKS}
    new.__dict__.update(own, _is_full_backward_hook=True if own["_backward_hooks"] else None)


def take_attributes(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` what somebody set on the layer whose place it takes: public attributes that belong to neither kind of layer."""
    known = vars(new).keys() | _FIELDS
    new.__dict__.update({name: value for name, value in vars(old).items() if name[0] != "_" and name not in known})
