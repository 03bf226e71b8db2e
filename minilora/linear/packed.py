"""A frozen linear layer whose weight is packed codes and scales: ``QuantLinear``. Next file: ``linear/layers.py``."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import QuantizationError
from minilora.linear.ops import dequantize, quant_linear
from minilora.linear.shown import shown_weight
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import QuantizedTensor

__all__ = [
    "QuantLinear",
    "calls_only_forward",
    "dtype_after",
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
    "double_quant",
    "conv1d",
    "absmax",
    "nested_absmax",
    "nested_offset",
}
_FORMAT = "_extra_state"  # what torch calls it in a state dict


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D``, known by its name and shape so that transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module.weight, "dim", int)() == 2


def rows_of(layer: nn.Module) -> Tensor:
    """The weight of a dense layer as ``[out, in]``, detached, over the same memory."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if is_conv1d(layer) else weight


class QuantLinear(nn.Module):
    """A frozen linear layer whose weight is stored as packed codes and scales (QLoRA section 3).

    Codes and scales are ``uint8`` parameters that never train: ``.to(bfloat16)`` leaves them whole, DDP does not broadcast them, FSDP2
    shards them. fp32 scales are therefore kept as their bytes. A state dict also says which format the bytes are of.

    Attributes:
        weight: what a model sees that asks for it: ``[out, in]`` in ``dtype``, made when it is computed with (``shown.py``).
        codes: uint8, the parameter called "weight": ``[out, in * bits / 8]`` where a row divides evenly, else flat.
        absmax: uint8; ``[blocks, 4]`` fp32 bytes, or ``[blocks]`` 8-bit codes with double quantization.
        nested_absmax, nested_offset: uint8 fp32 bytes ``[n, 4]``, or None.
        bias: ``[out]`` or None.
        dtype: of the weight before it was packed; follows ``.to(dtype)``, as a dense weight would.
        conv1d: the class to go back to when the layer becomes dense, where it was a ``Conv1D``; else None.
    """

    def __init__(
        self, weight: QuantizedTensor, bias: nn.Parameter | None = None, conv1d: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.book, self.blocksize, self.dtype = weight.book, weight.blocksize, weight.dtype
        self.double_quant = weight.nested_absmax is not None
        nested, offset = weight.nested_absmax, weight.nested_offset
        self.register_parameter("weight", stored(weight.packed))
        self.absmax = stored(weight.absmax)
        self.nested_absmax = None if nested is None else stored(nested)
        self.nested_offset = None if offset is None else stored(offset)
        self.bias = bias
        self.conv1d = conv1d

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

    @property
    def codes(self) -> nn.Parameter:
        """The packed codes."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with; the codes themselves while FSDP has them in shards, where nobody can multiply."""
        if "weight" not in self._parameters:
            raise AttributeError("QuantLinear has no weight yet")
        if type(codes := self._parameters["weight"]) is not nn.Parameter:
            return codes  # type: ignore[return-value]
        shape = torch.Size((self.out_features, self.in_features))
        if self.conv1d is None:
            return shown_weight(lambda: dequantize(self.quantized()), shape, self.dtype, codes.device, stored=codes)
        return shown_weight(
            lambda: dequantize(self.quantized()).t(), shape[::-1], self.dtype, codes.device, stored=codes
        )

    def quantized(self) -> QuantizedTensor:
        """The weight as a ``QuantizedTensor`` over the same memory."""
        codes = refuse_other_codes(self._parameters["weight"])
        absmax = self.absmax if self.double_quant else floats(self.absmax)
        nested = None if self.nested_absmax is None else floats(self.nested_absmax)
        offset = None if self.nested_offset is None else floats(self.nested_offset)
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(codes, absmax, shape, self.dtype, self.book, self.blocksize, nested, offset)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in ``x``'s dtype."""
        return quant_linear(x, self.quantized(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = dtype_after(fn, self.dtype, self.absmax.device)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """What the bytes mean, as JSON in uint8: a tensor, so that every writer of tensors can write it."""
        return format_state(format_of(self, [self.out_features, self.in_features]))

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: ``_load_from_state_dict`` has compared it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Raises ``QuantizationError`` for the bytes of another format, which would decode to anything.

        A state that names no format was put together from parameters: torch says that a key is missing, and takes it with ``strict=False``.
        """
        load_format(state_dict, prefix, format_of(self, [self.out_features, self.in_features]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bits = f"{self.quantized().bits_per_weight:.3f}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.format}, {bits} bits"


def format_of(layer: Any, shape: list[int]) -> dict[str, Any]:
    """What the bytes of a packed layer mean: JSON values."""
    levels = hashlib.sha256(repr(layer.book.levels).encode()).hexdigest()[:16]
    known = {"format": layer.book.name, "levels": levels, "blocksize": layer.blocksize}
    return known | {"double_quant": layer.double_quant, "shape": shape}


def format_state(known: dict[str, Any]) -> Tensor:
    """The same as a tensor for a state dict, ``uint8``."""
    return torch.tensor(list(json.dumps(known, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")


def load_format(state_dict: Any, prefix: str, own: dict[str, Any]) -> None:
    """Raise ``QuantizationError`` where a state says that its bytes are of another format."""
    if not isinstance(said := state_dict.get(prefix + _FORMAT), Tensor):
        return
    path = prefix.removesuffix(".")
    try:
        found = json.loads(bytes(said.cpu().tolist()))
        other = [f"{key}={found[key]} and this layer {value}" for key, value in own.items() if found[key] != value]
    except (ValueError, KeyError, TypeError):
        other = ["a format that cannot be read"]
    if other:
        raise QuantizationError(
            f"{path or 'weight'}: the state has {'; '.join(other)}; pack the model as the saved one was"
        )


def dtype_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that ``nn.Module._apply(fn)`` (``.to``, ``.half`` ...) makes of this one."""
    return fn(torch.empty(0, dtype=dtype, device=device)).dtype


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


def refuse_other_codes(codes: Tensor | None) -> Tensor:
    """The codes of a packed layer. Raises ``QuantizationError`` where they are no longer ``uint8``."""
    if codes is None or codes.dtype != torch.uint8:
        kind = "nothing" if codes is None else codes.dtype
        raise QuantizationError(
            f"a packed layer holds {kind} where its uint8 codes were; something wrote over them, pack it again"
        )
    return codes


def stored(values: Tensor) -> nn.Parameter:
    """A frozen uint8 parameter; fp32 becomes its four bytes in a last dimension."""
    held = values if values.dtype == torch.uint8 else values.unsqueeze(-1).view(torch.uint8)
    return nn.Parameter(held, requires_grad=False)


def floats(held: Tensor) -> Tensor:
    """The fp32 values whose bytes ``stored`` holds."""
    return held.view(torch.float32).squeeze(-1)
