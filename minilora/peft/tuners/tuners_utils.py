"""What every adapted place of a model has in PEFT's shape. Next file: ``peft/tuners/lora/layer.py``."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minilora.errors import StateError
from minilora.lora.slot import own_parameters

__all__ = ["BaseTuner", "BaseTunerLayer", "view_of"]


class BaseTuner(nn.Module):
    """Base of ``LoraModel``."""


class BaseTunerLayer(ABC):
    """A layer with adapters: ``isinstance`` says so of PEFT's shape and of the adapter that stands in the model.

    Attributes:
        slot, adapters: the place and the record of the model that this is a view of. standing: what is called in its place.
        kept: adapter name to the adapter.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    slot: Any
    adapters: Any
    standing: Any
    kept: Any

    def __getattr__(self, name: str) -> Any:
        """Dictionaries that no adapter here fills are empty; the rest is the base layer's."""
        try:
            return nn.Module.__getattr__(self, name)  # type: ignore[arg-type]
        except AttributeError:
            if name in self.adapter_layer_names:
                return nn.ParameterDict() if "embedding" in name else nn.ModuleDict()
            if name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base_layer"], name)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        """``training`` and the like are those of what stands in the model."""
        if name == "training":
            self.standing().training = value
        nn.Module.__setattr__(self, name, value)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer in the model returns."""
        return self.standing()(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``, of what stands in the model too."""
        self.standing().train(mode)
        return nn.Module.train(self, mode)  # type: ignore[type-var]

    def get_base_layer(self) -> nn.Module:
        """The frozen layer under all adapters."""
        return self.slot.base

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as in PEFT."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, as in PEFT."""
        return self.get_base_layer().bias  # type: ignore[return-value]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters of the model."""
        return list(self.adapters.active)

    @property
    def active_adapter(self) -> list[str]:
        """The same: PEFT's layers hold a list."""
        return list(self.adapters.active)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer."""
        return [name for name in self.adapters.merged if name in self.kept]

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into this layer."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the model is in a ``disable_adapter`` block."""
        return self.adapters.is_bare

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters train, or not, here."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in own_parameters(self.kept[name]) if name in self.kept else ():
                parameter.requires_grad = requires_grad

    def _of_the_model(self, what: str, *_: Any, **__: Any) -> Any:
        raise StateError(
            f"{self.slot.path}: {what} changes a whole model here, not one layer; call {what} of the model"
        )

    def merge(self, *args: Any, **kwargs: Any) -> Any:
        """Refused by name: a model is merged as one."""
        self._of_the_model("merge_adapter()")

    def unmerge(self) -> Any:
        """Refused by name: a model is unmerged as one."""
        self._of_the_model("unmerge_adapter()")

    def set_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused by name: a model has one set of active adapters."""
        self._of_the_model("set_adapter()")

    def delete_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused by name: an adapter is deleted from the whole model."""
        self._of_the_model("delete_adapter()")


def view_of(kind: Any, slot: Any, kept: Mapping[str, Any], standing: Callable[[], Any], adapters: Any) -> Any:
    """An object of this kind without children, for a place of a model."""
    made = kind.__new__(kind)
    made.__dict__.update(nn.Module().__dict__)
    made.__dict__.update(slot=slot, adapters=adapters, standing=standing, kept=dict(kept))
    made.__dict__["training"] = standing().training
    return made
