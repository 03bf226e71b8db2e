"""What an adapter is: a module around a frozen base layer, with one law.

In eval mode, for every variant, every base layer and every input::

    adapter(x) == F.linear(x, dense_weight(base_layer) + adapter.delta_weight(), bias + adapter.delta_bias())

From it follow merging, unmerging, sums of adapters, spectra and export, none of which needs to know the variant. A variant is one
file: subclass ``Adapter`` (or ``LoRALinear``), write ``__init__``, ``forward`` and ``delta_weight``, put ``@register("name")`` above
it; the tests in ``tests/laws`` then run over it. Next file: ``lora/slots.py``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, StateError, TargetError, nearest
from minilora.linear.layers import as_stored, compute_dtype, dense_weight, in_out_features, is_foreign, weight_name
from minilora.linear.shown import shown_weight
from minilora.lora.config import LoraConfig

__all__ = ["VARIANTS", "Adapter", "register", "registered", "variant", "variants_on"]

VARIANTS: dict[str, type[Adapter]] = {}  # for linear layers
_ON: dict[str, dict[str, type[Adapter]]] = {
    "linear": VARIANTS,
    "embedding": {},
    "convolution": {},
    "attention": {},
    "experts": {},
    "router": {},
}


class Adapter(nn.Module, ABC):
    """A trainable update around ``base_layer``.

    Args:
        base_layer: the frozen layer, or another adapter when adapters are stacked.
        config: what the user asked for; keep only what ``forward`` uses.
        path: dotted path of the slot, for patterns and messages.

    A subclass's ``__init__`` has these arguments, creates its parameters on the base layer's device, and leaves the output of the
    layer unchanged (identity at initialisation).
    """

    # Attribute -> what the file calls it; everything that a variant saves stands here.
    file_names: ClassVar[dict[str, str]] = {}
    # Parameters that never train.
    fixed: ClassVar[frozenset[str]] = frozenset()
    # Whether ``delta_weight`` depends on the base layer's weight, so that another adapter must not be merged under it.
    reads_base: ClassVar[bool] = False
    # Whether ``__init__`` puts another base layer in the place of the one it got.
    replaces_base: ClassVar[bool] = False
    # Whether this one did: it does not where it finds the base layer that it would have made.
    base_replaced: bool = False
    # The attribute of the base layer that holds the data of its start; taken away when the adapter is placed. "" for none.
    data_name: ClassVar[str] = ""
    # Why this one is nothing without a file that fills it (its start is made from what is not here); "" where it can start.
    wants_file: str = ""
    # Parameters of the base model, by path, that its file brings: written when the adapter is placed.
    brings: Mapping[str, Tensor] = {}
    # Whether the update is another one for each input: ``delta_weight`` raises then.
    depends_on_input: ClassVar[bool] = False
    # A digest of what went into it beside config and base layer; a file remembers it, and loads beside the same only.
    made_with: str = ""
    # The kind of layer that it stands on (``linear.layers.kind_of``), which ``register`` says.
    on: ClassVar[str] = "linear"
    # Whether ``target_modules`` named this layer; False for one that follows from another field or layer.
    targeted: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_out_features(base_layer)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The update as a dense ``[out, in]`` in fp32. One that depends on the input raises ``StateError``, and cannot be merged."""

    @staticmethod
    def file_path(path: str) -> str:
        """The layer's path as it stands in a file."""
        return path

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """The attribute ``name`` as a file has it."""
        return tensor

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of ``to_file``; a tensor of another layout comes back as it is."""
        return tensor

    def delta_bias(self) -> Tensor | None:
        """The update of the bias, ``[out]`` in fp32, or None."""
        return None

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """``(A [r, in], B [out, r])`` in fp32 with ``delta_weight() == B @ A``: how other programs take this adapter.

        Raises:
            StateError: the update has no low rank, or changes a bias.
        """
        raise StateError(f"{type(self).__name__}: its update has no low rank, so it is no plain LoRA; merge it instead")

    def refuses(self, other: Adapter) -> str:
        """Why this one and another adapter of the same slot cannot be active or merged together; "" if they can."""
        return ""

    def __getattr__(self, name: str) -> Any:
        """What somebody set on the base layer as an attribute (a number that the model reads, a mark) is found here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            own = self.innermost.__dict__
            if name not in own:
                raise
            return own[name]

    @property
    def innermost(self) -> nn.Module:
        """The layer under all adapters of this slot."""
        base = self.base_layer
        return base.innermost if isinstance(base, Adapter) else base

    def alone_on(self, base: nn.Module) -> Adapter:
        """This adapter, its parameters shared, on the bare layer: it may stand on another adapter now, and forwards may run."""
        alone = copy.copy(self)
        alone._modules = self._modules | {"base_layer": base}
        return alone

    @property
    def weight(self) -> Tensor:
        """What a model sees that asks for the weight: the base layer's with every update of this slot, made when it is computed with."""
        stored: Tensor = getattr(self.innermost, weight_name(self.innermost))
        shape = (self.out_features, self.in_features) if is_foreign(self.innermost) else stored.shape
        trains = any(parameter.requires_grad for parameter in self.parameters())
        return shown_weight(self._whole_weight, torch.Size(shape), compute_dtype(self.innermost), stored.device, trains)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias with every update of this slot."""
        bias: Tensor | None = getattr(self.innermost, "bias", None)
        shifts = [shift for adapter in self._slot() if (shift := adapter.delta_bias()) is not None]
        if not shifts:
            return bias
        whole = torch.stack(shifts).sum(0)
        return whole.to(compute_dtype(self.innermost)) if bias is None else (bias.float() + whole).to(bias.dtype)

    def _slot(self) -> list[Adapter]:
        """This adapter and those under it."""
        under = self.base_layer
        return [self, *(under._slot() if isinstance(under, Adapter) else ())]

    def _whole_weight(self) -> Tensor:
        if any(_drops(adapter) for adapter in self._slot()):
            if (
                torch.compiler.is_compiling()
            ):  # asked for its dtype, most likely, and left out of the graph; a use of it shows
                return torch.full_like(as_stored(self.innermost, dense_weight(self.innermost)), torch.nan)
            raise StateError(
                f"an adapted layer ({self.in_features} to {self.out_features}) is not called, its weight is read, where "
                "lora_dropout cannot reach; set lora_dropout=0, or exclude the layer (exclude_modules)"
            )
        inner = self.innermost
        if getattr(inner, "groups", 1) > 1:
            raise StateError(
                f"an adapted {type(inner).__name__} of {inner.groups} groups is not called, its weight is read, and the update joins the "
                "groups; exclude the layer (exclude_modules)"
            )
        update = torch.stack([adapter.delta_weight() for adapter in self._slot()]).sum(0)
        return as_stored(inner, (dense_weight(inner).float() + update).to(compute_dtype(inner)))


def _drops(adapter: nn.Module) -> bool:
    dropout = getattr(adapter, "lora_dropout", None)
    return dropout is not None and dropout.training and not isinstance(dropout, nn.Identity)


def register(name: str, on: str = "linear") -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: make a variant known under ``name``, for one kind of layer (``linear.layers.kind_of``).

    Raises:
        ConfigError: the name is taken by another class, or there is no such kind of layer.
    """

    def add(cls: type[Adapter]) -> type[Adapter]:
        if on not in _ON:
            raise ConfigError(f"on={on!r}: wanted a kind of layer, one of {', '.join(map(repr, _ON))}")
        if _ON[on].get(name, cls).__qualname__ != cls.__qualname__:
            taken = _ON[on][name].__name__
            raise ConfigError(f"variant name {name!r} is taken by {taken}; register yours under another name")
        _ON[on][name] = cls
        cls.on = on
        return cls

    return add


def variant(name: str) -> type[Adapter]:
    """The registered class called ``name`` for linear layers. Raises ``ConfigError`` with the known names."""
    if name not in VARIANTS:
        raise ConfigError(
            f"variant {name!r} is not registered; known are {nearest(name, VARIANTS)}; import its module first (--plugin FILE)"
        )
    return VARIANTS[name]


def registered() -> dict[str, type[Adapter]]:
    """Every registered class; one for layers that are not linear is called ``kind: name``."""
    return {
        name if kind == "linear" else f"{kind}: {name}": cls for kind, on in _ON.items() for name, cls in on.items()
    }


def variants_on(kind: str) -> dict[str, type[Adapter]]:
    """The registered classes for a kind of layer, by name."""
    return dict(_ON[kind])


def variant_at(name: str, kind: str, path: str, layer: nn.Module) -> type[Adapter]:
    """The class called ``name`` for this layer. Raises ``ConfigError`` as ``variant``, ``TargetError`` where no such one stands there."""
    linear = variant(name)
    if kind == "linear":
        return linear
    if name not in _ON[kind]:
        known = " or ".join(sorted(_ON[kind]))
        a = "an" if type(layer).__name__[0] in "AEIOU" else "a"
        raise TargetError(
            f"{path} is {a} {type(layer).__name__}, which takes {known}, not {name}; leave it out, or give it an adapter of its own"
        )
    return _ON[kind][name]
