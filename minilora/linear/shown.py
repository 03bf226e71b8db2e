"""What ``layer.weight`` answers where the layer is more than one dense parameter: packed, or adapted.

Models ask a layer for its weight without calling the layer. Most want its dtype, device or shape (T5 casts by ``wo.weight.dtype``);
some multiply with it themselves (Mamba's ``dt_proj``, ``nn.MultiheadAttention``'s ``out_proj``, a head that reads the embedding). A
``ShownWeight`` answers the first kind at once and costs nothing; for the second it is the dense effective weight, made when it is
asked for: what the layer itself multiplies with, gradients included. So a layer that is read computes what a layer that is called does.
It is no parameter and holds no numbers: a write into it could not last, and is refused. Next file: ``linear/frozen.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minilora.errors import StateError

__all__ = ["ShownWeight", "shown_weight"]

_TENSOR: Any = Tensor
_ASKED = {
    getattr(_TENSOR, name).__get__
    for name in (
        "dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cuda", "is_cpu", "is_sparse",
        "is_mps", "is_xpu", "is_nested", "is_quantized", "is_mkldnn", "itemsize",
    )
} | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__,
     Tensor.get_device, Tensor.nelement, torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip
_ALONE = {_TENSOR.data.__get__, Tensor.detach}  # the same weight without its gradient
_POINTERS = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.share_memory_, Tensor.set_}


class ShownWeight(Tensor):
    """A weight that is made when somebody computes with it. ``make`` returns it dense, in its dtype and orientation."""

    make: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ALONE:
            make = args[0].make
            shown = args[0]
            return shown_weight(lambda: make().detach(), shown.shape, shown.dtype, shown.device)
        if func is Tensor.__repr__:
            return f"ShownWeight({list(args[0].shape)}, {args[0].dtype})"
        if func in _POINTERS:
            raise StateError(
                f"{getattr(func, '__name__', func)}: a packed or adapted layer has no dense weight in memory; merge or unpack it first"
            )
        if _writes(func, args, kwargs):
            return _write(func, args, kwargs)
        return func(*tree_map_only(ShownWeight, _dense, args), **tree_map_only(ShownWeight, _dense, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For what comes past Python's functions, from C++."""
        return func(*tree_map_only(ShownWeight, _dense, args), **tree_map_only(ShownWeight, _dense, kwargs or {}))


def shown_weight(
    make: Callable[[], Tensor],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    trains: bool = False,
    stored: nn.Parameter | None = None,
) -> Tensor:
    """The answer of a layer: ``make()`` is the dense weight of that shape and dtype. A compiler or tracer gets it dense at once.

    Args:
        trains: whether an adapter in it does.
        stored: the parameter of the layer that it stands for: ``get_parameter`` may return it, and the marks that others put on that
            (transformers notes what it has initialized) are seen on it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return make()  # what is not used is left out of the graph
    made: Any = torch.Tensor._make_wrapper_subclass(
        ShownWeight, shape, dtype=dtype, device=device, requires_grad=trains
    )
    if stored is not None:
        made.__dict__.update(stored.__dict__)
    made.make, made._is_param = make, stored is not None
    return made


def _dense(weight: Any) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.make()


_IN_PLACE = {
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__set__",
}
_SETTINGS = ("__set__", "requires_grad_", "resize_")  # change more than the numbers


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this function would write into a shown weight: in place, which its name says, or as ``out``."""
    name, out = getattr(func, "__name__", ""), kwargs.get("out")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    first = args[:1] or tuple(kwargs.values())[:1]  # nn.init names it
    held = (*(first if in_place else ()), *(out if isinstance(out, (tuple, list)) else (out,)))
    return any(isinstance(each, ShownWeight) for each in held)


def _write(func: Any, args: Any, kwargs: Any) -> Any:
    """A write that changes nothing (RWKV multiplies by a power of two that may be 1) is none; any other would be lost."""
    name = getattr(func, "__name__", str(func))
    if args and isinstance(args[0], ShownWeight) and "out" not in kwargs and name not in _SETTINGS:
        before = _dense(args[0]).detach()
        after, rest = before.clone(), tree_map_only(ShownWeight, _dense, (args[1:], kwargs))
        with torch.no_grad():
            func(after, *rest[0], **rest[1])
        if torch.equal(before, after):
            return args[0]
    raise StateError(
        f"{name}: writes into the weight of a packed or adapted layer, which would be lost; change the base model before it is packed or "
        "adapted, or exclude the layer (exclude_modules)"
    )
