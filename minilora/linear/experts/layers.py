"""The frozen layers of experts: one projection of all of them, dense or packed.

    y[rows of e] = W[e] x[rows of e]          ``x [S, in]`` sorted by expert, ``W [E, out, in]``

A model keeps such a weight as a bare parameter of its experts module. Here it is a layer like any other, so that an adapter can stand
on it and packed codes can take its place. Biases stay with the experts module. Next file: ``linear/experts/grouped.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.experts.grouped import Stack, grouped_linear, lora_experts
from minilora.linear.experts.routes import Routes
from minilora.linear.experts.whole import Projection
from minilora.linear.frozen import dtype_after, floats, format_state, load_format, refuse_other_codes, stored
from minilora.linear.ops import is_transformed
from minilora.linear.packed import format_of
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.stack import QuantizedStack, quantize_stack

__all__ = ["ExpertsLinear", "QuantExperts", "is_experts", "rows_of_experts", "stack_of"]


class ExpertsLinear(nn.Module):
    """One projection of all experts, dense.

    Attributes:
        weight: the parameter of the model itself, ``[E, out, in]``, or ``[E, in, out]`` where it is ``transposed``.
        experts, out_features, in_features: E, out, in.
        stays: whether it stays a layer when nothing adapts it (``hook.open_experts``).
        crossed: whether it is transposed and its module does not say so, so that PEFT takes its inputs for its outputs.
    """

    stays = False

    def __init__(
        self,
        weight: nn.Parameter,
        transposed: bool = False,
        sizes: tuple[int, int, int] | None = None,
        crossed: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.transposed, self.crossed = weight, transposed, crossed
        given = tuple(weight.shape) if sizes is None else sizes
        self.flat = tuple(weight.shape) != given  # DBRX keeps [E * out, in]
        self.experts, rows, columns = given
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """``[S, in]`` sorted by expert to ``[S, out]``."""
        rows = rows_of_experts(self, self.weight)
        if self.weight.requires_grad or torch.compiler.is_compiling() or is_transformed():
            return grouped_linear(x, rows, routes)
        return lora_experts(x, rows, routes)

    def as_projection(self) -> Projection | None:
        """What ``forward`` multiplies with, where nobody has changed what it does and the weight is frozen."""
        if self.weight.requires_grad or type(self).forward is not ExpertsLinear.forward:
            return None
        return Projection(rows_of_experts(self, self.weight))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class QuantExperts(nn.Module):
    """One projection of all experts as packed codes and scales, frozen (QLoRA, section 3); only experts with rows are decoded.

    As in ``QuantLinear`` everything is ``uint8``: ``weight`` holds the codes, ``[E, out, in * bits / 8]`` or ``[E, bytes]``; ``absmax``
    the scales of each expert, ``[E, blocks, 4]`` or ``[E, blocks]``; ``nested_absmax``, ``nested_offset`` as there.

    Attributes:
        dtype: of the weight before it was packed. transposed: whether the model keeps the dense weight ``[E, in, out]``.
        flat: whether the model keeps it as one matrix, ``[E * rows, columns]``. crossed: as in ``ExpertsLinear``.
    """

    def __init__(
        self, weight: QuantizedStack, transposed: bool = False, flat: bool = False, crossed: bool = False
    ) -> None:
        super().__init__()
        self.experts, self.out_features, self.in_features = weight.shape
        own, self.transposed, self.flat, self.crossed = weight.stored, transposed, flat, crossed
        self.book, self.blocksize, self.dtype = own.book, own.blocksize, own.dtype
        self.double_quant, self.whole = own.nested_absmax is not None, weight.is_whole
        nested, offset = own.nested_absmax, own.nested_offset
        self.weight = stored(own.packed.reshape(self.experts, *own.packed.shape[1:]) if own.packed.dim() > 1
                             else own.packed.view(self.experts, -1))  # fmt: skip
        self.absmax = stored(own.absmax.view(self.experts, -1))
        self.nested_absmax = None if nested is None else stored(nested)
        self.nested_offset = None if offset is None else stored(offset)

    @classmethod
    def from_experts(cls, layer: ExpertsLinear, config: QuantConfig, name: str = "weight") -> QuantExperts:
        """Quantize a dense projection. Arguments and errors as ``quantize_stack``."""
        rows = rows_of_experts(layer, layer.weight.detach())
        return cls.in_place_of(layer, quantize_stack(rows, config, name))

    @classmethod
    def in_place_of(cls, layer: ExpertsLinear, weight: QuantizedStack) -> QuantExperts:
        """A packed projection where the model keeps a dense one."""
        return cls(weight, layer.transposed, layer.flat, layer.crossed)

    @property
    def format(self) -> str:
        """The codebook's name."""
        return self.book.name

    def quantized(self) -> QuantizedStack:
        """The weight as a ``QuantizedStack`` over the same memory. Raises ``QuantizationError`` where something wrote over the codes."""
        shape = torch.Size((self.experts, self.out_features, self.in_features))
        scales = (self.absmax if self.double_quant else floats(self.absmax)).reshape(-1)
        nested = None if self.nested_absmax is None else floats(self.nested_absmax)
        offset = None if self.nested_offset is None else floats(self.nested_offset)
        codes = refuse_other_codes(self.weight)
        held = shape if self.whole else torch.Size((self.experts, scales.numel() // self.experts * self.blocksize))
        own = QuantizedTensor(codes, scales, held, self.dtype, self.book, self.blocksize, nested, offset)
        return QuantizedStack(own, shape)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """``[S, in]`` sorted by expert to ``[S, out]``, in ``x``'s dtype."""
        if is_transformed():
            return grouped_linear(x, self.quantized().dequantize(x.dtype), routes)
        return lora_experts(x, self.quantized(), routes)

    def as_projection(self) -> Projection | None:
        """As in ``ExpertsLinear``."""
        return Projection(self.quantized()) if type(self).forward is QuantExperts.forward else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = dtype_after(fn, self.dtype, self.absmax.device)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """What the bytes mean, as in ``QuantLinear``."""
        return format_state(format_of(self, [self.experts, self.out_features, self.in_features]))

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: ``_load_from_state_dict`` has compared it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        load_format(state_dict, prefix, format_of(self, [self.experts, self.out_features, self.in_features]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bits = f"{self.quantized().stored.bits_per_weight:.3f}"
        known = f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{known}, {self.format}, {bits} bits"


def is_experts(layer: Any) -> bool:
    """Whether this is a projection of experts, dense or packed."""
    return isinstance(layer, (ExpertsLinear, QuantExperts))


def rows_of_experts(layer: ExpertsLinear | QuantExperts, weight: Tensor) -> Tensor:
    """A weight as the model keeps it, seen as ``[E, out, in]``: a view of the same memory."""
    if layer.flat:
        weight = weight.view(layer.experts, -1, weight.shape[-1])
    return weight.transpose(1, 2) if layer.transposed else weight


def as_model_keeps(layer: ExpertsLinear | QuantExperts, rows: Tensor) -> Tensor:
    """``[E, out, in]`` the way round that the model keeps it: the inverse of ``rows_of_experts``."""
    kept = rows.transpose(1, 2) if layer.transposed else rows
    return kept.flatten(0, 1) if layer.flat else kept


def with_experts(layer: ExpertsLinear | QuantExperts, rows: Tensor) -> ExpertsLinear:
    """A new dense projection like ``layer`` that holds ``rows [E, out, in]``."""
    return with_stored(layer, as_model_keeps(layer, rows).contiguous())


def with_stored(layer: ExpertsLinear | QuantExperts, weight: Tensor) -> ExpertsLinear:
    """A projection like ``layer`` whose parameter is ``weight``, laid out as the model keeps it."""
    sizes = (layer.experts, layer.out_features, layer.in_features)
    given = (sizes[0], sizes[2], sizes[1]) if layer.transposed else sizes
    return ExpertsLinear(nn.Parameter(weight, requires_grad=False), layer.transposed, given, layer.crossed)


def stack_of(layer: Any) -> Stack:
    """What a projection multiplies with: ``[E, out, in]`` dense, or the packed stack."""
    return layer.quantized() if isinstance(layer, QuantExperts) else rows_of_experts(layer, layer.weight)
