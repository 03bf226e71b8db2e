"""What an adapter trains whole: copies of modules and of biases, kept in fp32 as adapters are, and cast on the way out.

In bf16 a small step is lost in rounding (a value of 1 does not move by less than 0.004), and fp16 has no scaler for its gradients. The
model around a copy sees the dtype that it had before. Next file: ``lora/inject.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minilora.errors import StateError
from minilora.linear.fronts import Front, put_in_front, take_from_front
from minilora.linear.frozen import dtype_after
from minilora.linear.layers import CastsBias, is_quantized
from minilora.linear.ops import product_dtype

__all__ = ["in_given_dtype", "keep_bias_in_fp32", "share_parameters", "trained", "trained_bias"]

_HALF = (torch.float16, torch.bfloat16)


class _TrainsInFp32(Front):
    """Put in front of the class of a copy whose model computes in half precision: its parameters are fp32, what leaves it is not."""

    given_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind, place = self.given_dtype, next(self.parameters()).device
        if kind not in _HALF:
            return super().forward(*args, **kwargs)
        if product_dtype(kind, place) == kind:
            with torch.autocast(place.type, kind):
                out = super().forward(*args, **kwargs)
        else:  # this processor multiplies in fp32 anyway
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
            out = super().forward(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: x.to(kind) if x.dtype == torch.float32 else x, out)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.given_dtype = dtype_after(fn, self.given_dtype, next(self.parameters()).device)
        return super()._apply(fn, recurse)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def trained(new: nn.Module) -> nn.Module:
    """A copy of a module, all of it trained from now on, its half-precision parameters in fp32."""
    new.requires_grad_(True)
    if halves := [p.dtype for p in new.parameters() if p.dtype in _HALF]:
        new.float()
        put_in_front(new, _TrainsInFp32)
        new.given_dtype = halves[0]  # type: ignore[assignment]
    return new


def trained_bias(bias: Tensor) -> nn.Parameter:
    """A copy of a bias, in fp32 where the model is in half precision."""
    return nn.Parameter(_widened(bias.detach()).clone())


def keep_bias_in_fp32(layer: nn.Module) -> None:
    """Let a layer in half precision take a bias in fp32."""
    weight = layer._parameters.get("weight")
    if weight is not None and weight.dtype in _HALF and not is_quantized(layer):
        put_in_front(layer, CastsBias)


def in_given_dtype(value: nn.Module) -> nn.Module:
    """The copy as the model had it: parameters rounded to the dtype that they had, the class its own."""
    if isinstance(value, _TrainsInFp32):
        kind = value.given_dtype
        take_from_front(value, _TrainsInFp32)
        value.to(kind)
    return value


def share_parameters(new: nn.Module, old: nn.Module, twins: Iterable[nn.Module]) -> list[nn.Module]:
    """Copies of ``twins``, whose parameters are partly those of ``old``: those become those of ``new``, the others are copies.

    Raises:
        StateError: a twin holds a packed layer, which cannot be trained whole.
    """
    same = {id(p): q for p, q in zip(old.parameters(), new.parameters(), strict=True)}
    made = []
    for twin in twins:
        if any(is_quantized(part) for part in twin.modules()):
            raise StateError(
                f"{type(twin).__name__} shares a weight with a module of modules_to_save and is packed; give the dense model"
            )
        made.append(copy.deepcopy(twin, dict(same)).requires_grad_(True))
        if isinstance(new, _TrainsInFp32):
            made[-1].float()
            put_in_front(made[-1], _TrainsInFp32)
            made[-1].given_dtype = new.given_dtype  # type: ignore[assignment]
    return made
