"""``LoraLayer`` and its kin: one adapted place of a model in PEFT's shape, with a dictionary entry for each adapter that it has.

They are made by ``peft/faces.py``, stand in the model, and share their parameters with the adapters. Next file: ``peft/wrappers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import as_stored, is_transposed, kind_of
from minilora.lora.adapter import Adapter
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters
from minilora.many import scaling
from minilora.peft.base import BaseTunerLayer, face_of
from minilora.peft.parts import Field

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "MultiheadAttention",
    "ParamWrapper",
    "lora_layer",
]


class LoraLayer(BaseTunerLayer):
    """A layer with its adapters, the inactive ones too.

    Attributes:
        base_layer: the frozen layer. lora_A, lora_B, lora_dropout, lora_magnitude_vector, lora_embedding_A, lora_embedding_B: adapter
            name to what it trains. r, lora_alpha, scaling, use_rslora, use_dora, lora_bias: adapter name to a number or flag; a scaling
            that is set here counts from the next forward on.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )

    def __repr__(self) -> str:
        """As torch's, with PEFT's name of the kind in front."""
        return f"lora.{super().__repr__()}"

    @property
    def r(self) -> Mapping[str, int]:
        """Adapter name to rank."""
        return self._numbers(lambda name: getattr(self.kept[name], "r", 0))

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """Adapter name to ``lora_alpha`` at this layer."""
        return self._numbers(lambda name: self.adapters.configs[name].for_module(self.slot.path)[1])

    @property
    def scaling(self) -> Any:
        """Adapter name to the factor of its update; may be set."""
        return Field(
            self.kept,
            lambda name: getattr(self.kept[name], "scaling", 1.0),
            lambda name, value: setattr(self.kept[name], "scaling", value),
        )

    @property
    def use_rslora(self) -> Mapping[str, bool]:
        """Adapter name to the config's field."""
        return self._of_configs("use_rslora")

    @property
    def use_dora(self) -> Mapping[str, bool]:
        """Adapter name to the config's field."""
        return self._of_configs("use_dora")

    @property
    def lora_bias(self) -> Mapping[str, bool]:
        """Adapter name to the config's field."""
        return self._of_configs("lora_bias")

    def _numbers(self, get: Callable[[str], Any]) -> Any:
        return Field(self.kept, get)

    def _of_configs(self, field: str) -> Any:
        return self._numbers(lambda name: getattr(self.adapters.configs[name], field))

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        """Adapter name to what of it never trains (MiCA's B)."""
        return {name: tuple(sorted(adapter.fixed)) for name, adapter in self.kept.items() if adapter.fixed}

    @property
    def in_features(self) -> int:
        """Of the base layer."""
        return self._any().in_features

    @property
    def out_features(self) -> int:
        """Of the base layer."""
        return self._any().out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as ``[in, out]``."""
        return is_transposed(self.get_base_layer())

    def _any(self) -> Any:
        return next(iter(self.kept.values()))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight by one adapter, fp32, in the shape of the weight."""
        if adapter not in self.kept:
            raise StateError(f"{self.slot.path}: no adapter is called {adapter!r}; there are {list(self.kept)}")
        update = self.kept[adapter].delta_weight()
        return update.t() if self.fan_in_fan_out else update

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's factor to ``scale`` times what its config says; does nothing where the layer lacks the adapter."""
        if adapter in self.kept:
            scaling.set_scale(self.kept[adapter], scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters."""
        for name in self.active_adapters:
            if name in self.kept:
                scaling.scale_layer(self.kept[name], scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active adapters, or (None) set them to what their configs say."""
        for name in self.active_adapters:
            if name in self.kept:
                scaling.unscale_layer(self.kept[name], scale)


class Linear(LoraLayer):
    """A linear layer (of torch, ``Conv1D``, or packed)."""


class Embedding(LoraLayer):
    """An embedding."""


class Conv1d(LoraLayer):
    """A convolution."""


class Conv2d(LoraLayer):
    """A convolution."""


class Conv3d(LoraLayer):
    """A convolution."""


class MultiheadAttention(LoraLayer):
    """``nn.MultiheadAttention``."""


class ParamWrapper(LoraLayer):
    """A weight that its module reads and does not call: of experts, or of a router.

    Of experts ``lora_A[name].weight`` is ``[E, r, in]`` and ``lora_B[name].weight`` is ``[E, out, r]``, as they train; in a state dict they
    have PEFT's layout, ``[E * r, in]`` and ``[out, r * E]``.
    """

    @property
    def parameter_name(self) -> str:
        """What its module calls the weight."""
        return self.slot.attr if is_experts(self.slot.base) else "weight"

    @property
    def num_experts(self) -> int:
        """How many share the weight; 1 of a router."""
        return getattr(self.slot.base, "experts", 1)

    def get_base_layer(self) -> nn.Module:
        """The module that has the weight."""
        base: Any = self._modules["base_layer"]
        return base.get_base_layer() if isinstance(base, ParamWrapper) else base

    def get_param(self) -> Tensor:
        """The weight; while adapters are merged, with their updates in it."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As of the base class."""
        return as_stored(self.slot.base, super().get_delta_weight(adapter))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with all adapters of its weights."""
        stands = self.__dict__["stands"]
        return stands(*args, **kwargs) if is_experts(self.slot.base) else stands.forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As of the base class."""
        if is_experts(self.slot.base):
            self.__dict__["stands"].training = mode
        return super().train(mode)


_KINDS: tuple[tuple[Any, type], ...] = (
    (nn.Embedding, Embedding),
    (nn.Conv1d, Conv1d),
    (nn.Conv2d, Conv2d),
    (nn.Conv3d, Conv3d),
    (nn.MultiheadAttention, MultiheadAttention),
)


def lora_layer(slot: Slot, base: nn.Module, adapters: Adapters) -> nn.Module:
    """The ``LoraLayer`` of a slot, which shows ``base`` as its ``base_layer``, and no adapter yet."""
    base_kind: Any = kind_of(slot.base)  # type: ignore[arg-type]
    kind = (
        ParamWrapper
        if base_kind in ("experts", "router")
        else next((shown for own, shown in _KINDS if isinstance(slot.base, own)), Linear)
    )
    layer = face_of(kind, slot, adapters)
    layer._modules["base_layer"] = base
    return layer


BaseTunerLayer.register(Adapter)  # type: ignore[type-abstract]
LoraLayer.register(Adapter)  # type: ignore[type-abstract]
