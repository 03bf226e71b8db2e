"""What every adapted place of a model is to PEFT's users. Next file: ``peft/layers.py``."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from minilora.errors import StateError
from minilora.lora.change import LOCK, Change
from minilora.lora.slot import own_parameters
from minilora.peft import parts

__all__ = ["BaseTuner", "BaseTunerLayer", "face_of"]


class BaseTuner(nn.Module):
    """Base of ``LoraModel``."""


class BaseTunerLayer(nn.Module, ABC):
    """A place of a model that has adapters, with PEFT's names for all that is in it. A call runs what stands there.

    Attributes:
        slot, adapters: the place, and the record of the model. kept: adapter name to the adapter. stands: what a call runs.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    slot: Any
    adapters: Any
    kept: Any

    def enter(self, change: Change, name: str, value: Any) -> None:
        """Show an adapter."""
        change.item(self.kept, name, value)
        parts.enter(change, self, name, value)

    def leave(self, change: Change, name: str) -> None:
        """Show it no longer."""
        change.drop(self.kept, name)
        parts.leave(change, self, name)

    def stand_on(self, change: Change, base: nn.Module) -> None:
        """Show another layer under the adapters."""
        change.item(self._modules, "base_layer", base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapters and the base layer compute."""
        return self.__dict__["stands"].forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Dictionaries that no adapter here fills are empty; what the layer lacks is asked of what stands here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.adapter_layer_names or (name == "lora_dropout" and name in self.other_param_names):
                return nn.ParameterDict() if "embedding" in name else nn.ModuleDict()
            if name.startswith("__") or "stands" not in self.__dict__:
                raise
            return getattr(self.__dict__["stands"], name)

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``, of the adapters too."""
        for value in (self.slot.base, self.slot.merged, *self.kept.values()):
            if value is not None:
                value.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to``, ``.half`` and the like reach the adapters' buffers too, and the layer that comes back after a merge."""
        super()._apply(fn, recurse)
        for value in self.kept.values() if self.slot.merged is None else (self.slot.base, *self.kept.values()):
            value._apply(fn, recurse)
        return self

    def get_base_layer(self) -> nn.Module:
        """The frozen layer under all adapters; while some are merged, the layer that they are merged into."""
        return self.slot.under

    @property
    def weight(self) -> Tensor:
        """What a model may ask for: the weight with what stands here in it, in the layer's compute dtype."""
        return self.__dict__["stands"].weight

    @property
    def bias(self) -> Tensor | None:
        """Likewise the bias."""
        return self.__dict__["stands"].bias

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active in this layer."""
        return list(self.adapters.chosen if self.slot.only is None else self.slot.only)

    @property
    def active_adapter(self) -> list[str]:
        """The same: PEFT's layers hold a list."""
        return self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer."""
        return [name for name in self.adapters.merged if name in self.kept]

    def _all_available_adapter_names(self) -> list[str]:
        """Names of the adapters that this layer has, in order."""
        return sorted(self.kept)

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into this layer."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer is switched off, or the model in a ``disable_adapter`` block."""
        return self.adapters.is_bare or self.slot.off

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters of this layer; frozen with ``inference_mode``. What asks for those of the whole model (merging,
        training) raises until every layer has the same."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with LOCK, Change() as change:
            self.adapters.activate_here(change, self.slot, names)
        if inference_mode:
            self.set_requires_grad(names, False)

    def enable_adapters(self, enabled: bool) -> None:
        """Let this layer show its adapters, or none."""
        with LOCK, Change() as change:
            self.adapters.switch_here(change, self.slot, enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters train, or not, here."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in own_parameters(self.kept[name]) if name in self.kept else ():
                parameter.requires_grad = requires_grad

    def _of_the_model(self, what: str) -> Any:
        raise StateError(
            f"{self.slot.path}: {what} changes a whole model here, not one layer; call {what} of the model"
        )

    def merge(self, *args: Any, **kwargs: Any) -> Any:
        """Refused by name: a model is merged as one."""
        self._of_the_model("merge_adapter()")

    def unmerge(self) -> Any:
        """Refused by name: a model is unmerged as one."""
        self._of_the_model("unmerge_adapter()")

    def delete_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused by name: an adapter is deleted from the whole model."""
        self._of_the_model("delete_adapter()")


def face_of(kind: type[BaseTunerLayer], slot: Any, adapters: Any) -> Any:
    """A face of this kind without children, for a place of a model."""
    face = kind()
    face.__dict__.update(slot=slot, adapters=adapters, kept={}, stands=slot.standing)
    face.training = slot.standing.training
    return face
