"""What every frozen linear layer over packed bytes is: ``PackedLinear``. Next file: ``linear/packed.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import QuantizationError
from minilora.linear.ops import dequantize, quant_linear
from minilora.linear.shown import shown_weight
from minilora.quant.weight import PackedWeight

__all__ = [
    "PackedLinear",
    "dtype_after",
    "floats",
    "format_state",
    "load_format",
    "refuse_other_codes",
    "stored",
]

_FORMAT = "_extra_state"  # what torch calls it in a state dict


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is stored as bytes, whatever they mean (``QuantLinear``, ``GGUFLinear``).

    The bytes are ``uint8`` parameters that never train: ``.to(bfloat16)`` leaves them whole, DDP does not broadcast them, FSDP2 shards
    them. A state dict also says which format they are of.

    Attributes:
        weight: what a model sees that asks for it: ``[out, in]`` in ``dtype``, made when it is computed with (``shown.py``).
        codes: uint8, the parameter called "weight".
        bias: ``[out]`` or None.
        dtype: in which a dense weight would be; follows ``.to(dtype)``, as it would.
        conv1d: the class to go back to when the layer becomes dense, where it was a ``Conv1D``; else None.
    """

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None, conv1d: type[nn.Module] | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.conv1d = weight.dtype, conv1d
        self.register_parameter("weight", stored(weight.packed))
        self.bias = bias

    @property
    def format(self) -> str:
        """The name of its format."""
        raise NotImplementedError

    def quantized(self) -> PackedWeight:
        """The weight over the same memory."""
        raise NotImplementedError

    def meaning(self) -> dict[str, Any]:
        """What the bytes mean, in JSON values that a state dict keeps; ``format`` and ``shape`` among them."""
        raise NotImplementedError

    @property
    def codes(self) -> nn.Parameter:
        """The packed bytes."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with; the codes themselves while FSDP has them in shards, where nobody can multiply."""
        if "weight" not in self._parameters:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        if type(codes := self._parameters["weight"]) is not nn.Parameter:
            return codes  # type: ignore[return-value]
        shape = torch.Size((self.out_features, self.in_features))
        if self.conv1d is None:
            return shown_weight(lambda: dequantize(self.quantized()), shape, self.dtype, codes.device, stored=codes)
        return shown_weight(
            lambda: dequantize(self.quantized()).t(), shape[::-1], self.dtype, codes.device, stored=codes
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in ``x``'s dtype."""
        return quant_linear(x, self.quantized(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = dtype_after(fn, self.dtype, self.codes.device)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """What the bytes mean, as JSON in uint8: a tensor, so that every writer of tensors can write it."""
        return format_state(self.meaning())

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: ``_load_from_state_dict`` has compared it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Raises ``QuantizationError`` for the bytes of another format, which would decode to anything.

        A state that names no format was put together from parameters: torch says that a key is missing, and takes it with ``strict=False``.
        """
        load_format(state_dict, prefix, self.meaning())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bits = f"{self.quantized().bits_per_weight:.3f}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.format}, {bits} bits"


def format_state(known: dict[str, Any]) -> Tensor:
    """What the bytes of a layer mean as a tensor for a state dict, ``uint8``."""
    return torch.tensor(list(json.dumps(known, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")


def load_format(state_dict: Any, prefix: str, own: dict[str, Any]) -> None:
    """Raise ``QuantizationError`` where a state says that its bytes are of another format."""
    if not isinstance(said := state_dict.get(prefix + _FORMAT), Tensor):
        return
    path = prefix.removesuffix(".")
    try:
        found = json.loads(bytes(said.cpu().tolist()))
        asked = own if found["format"] == own["format"] else {"format": own["format"]}
        other = [f"{key}={found[key]} and this layer {value}" for key, value in asked.items() if found[key] != value]
    except (ValueError, KeyError, TypeError):
        other = ["a format that cannot be read"]
    if other:
        raise QuantizationError(
            f"{path or 'weight'}: the state has {'; '.join(other)}; pack the model as the saved one was"
        )


def dtype_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that ``nn.Module._apply(fn)`` (``.to``, ``.half`` ...) makes of this one."""
    return fn(torch.empty(0, dtype=dtype, device=device)).dtype


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
