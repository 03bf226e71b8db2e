"""``LoraModel``: what PEFT has between a ``PeftModel`` and the model. Here it is a view of the model, made when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minilora.errors import ConfigError, StateError
from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of, has_adapters, unwrapped
from minilora.many import adapted, combine, merging
from minilora.peft.base import BaseTuner
from minilora.peft.faces import give_faces, twin

__all__ = ["LoraModel"]


class LoraModel(BaseTuner):
    """The adapters of a model under PEFT's names; its ``model`` is the model with LoRA layers in it.

    ``LoraModel(model, config, "default")`` injects adapters, as PEFT's does, and the model itself gains no methods.
    """

    prefix: str = "lora_"

    def __init__(self, model: nn.Module, config: Any, adapter_name: str = "default", **_: Any) -> None:
        if isinstance(config, Mapping):
            if adapter_name not in config:
                raise ConfigError(f"the configs are of {list(config)}; wanted one of {adapter_name!r}")
            config = config[adapter_name]
        if not (has_adapters(model) and adapter_name in adapters_of(model).configs):
            inject(model, config, adapter_name, activate=not has_adapters(model))
        with LOCK, Change() as change:
            give_faces(change, model)
        self._look(model)

    @classmethod
    def of(cls, model: nn.Module) -> LoraModel:
        """The view of a model that has adapters."""
        view = cls.__new__(cls)
        view._look(model)
        return view

    def _look(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["_whole"] = model
        self.prefix = next((config.prefix for config in self.peft_config.values()), "lora_")
        self._modules["model"] = twin(model)
        self.training = model.training

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to its config."""
        return adapters_of(self._whole).configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(adapters_of(self._whole).active)

    @property
    def active_adapter(self) -> list[str]:
        """The same."""
        return self.active_adapters

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers that have an adapter."""
        return [path for path, read in self._targeted().items() if not read]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the weights that have one: of experts and routers."""
        return [path if read == "experts" else f"{path}.weight" for path, read in self._targeted().items() if read]

    def _targeted(self) -> dict[str, str]:
        """Path to "experts", "router", or "" for a layer that is called."""
        found = {}
        for path, slot in adapters_of(self._whole).slots.items():
            kinds = [v.on for v in slot.kept.values() if isinstance(v, Adapter) and v.targeted]
            if kinds:
                found[path] = kinds[0] if kinds[0] in ("experts", "router") else ""
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self._whole(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, **_: Any) -> None:
        """Nothing is left to do: ``add_adapter`` of the model injects."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters; with ``inference_mode`` frozen. Raises ``StateError`` while some are merged."""
        if merged := adapters_of(self._whole).merged:
            raise StateError(
                f"adapters {list(merged)} are merged and would stay in the weights; unmerge_adapter() first"
            )
        adapted.set_adapter(self._whole, adapter_name)
        if inference_mode:
            self.set_requires_grad(adapter_name, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters train, or not."""
        names: list[Any] = list(adapter_names) if isinstance(adapter_names, (list, tuple, set)) else [adapter_names]
        for name in names:
            for value in adapters_of(self._whole).named(name).values():
                for parameter in own_parameters(value):
                    parameter.requires_grad = requires_grad

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        adapted.delete_adapter(self._whole, adapter_name)

    def disable_adapter_layers(self) -> None:
        """Show the bare model until ``enable_adapter_layers``."""
        adapters_of(self._whole).hide()

    def enable_adapter_layers(self) -> None:
        """Undo ``disable_adapter_layers``, and switch layers on that were off."""
        adapters = adapters_of(self._whole)
        adapters.unhide()
        with LOCK, Change() as change:
            for slot in adapters.slots.values():
                if slot.off:
                    adapters.switch_here(change, slot, True)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights."""
        merging.merge(self._whole, adapter_names)

    def unmerge_adapter(self) -> None:
        """Put the layers back."""
        merging.unmerge(self._whole)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """The plain model with the updates in its weights."""
        if hasattr(self._whole, "merge_and_unload"):
            return self._whole.merge_and_unload(progressbar, safe_merge, adapter_names)
        if not adapters_of(self._whole).merged:
            merging.merge(self._whole, adapter_names)
        return self._plain(keep_merged=True)

    def unload(self) -> Any:
        """The plain model as it was."""
        return self._whole.unload() if hasattr(self._whole, "unload") else self._plain(keep_merged=False)

    def _plain(self, keep_merged: bool) -> nn.Module:
        with LOCK, Change() as change:
            adapted.take_out(change, self._whole, keep_merged)
            change.drop(unwrapped(self._whole).__dict__, "peft_config")  # of inject_adapter_in_model
        return self._whole

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Make a new adapter from others (``minilora.many.combine``)."""
        combine.add_weighted_adapter(self._whole, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update can be written as a plain LoRA: where it is a matrix for each layer, and not one for each expert."""
        values = adapters_of(self._whole).named(adapter_name).values()
        return not any(isinstance(value, Adapter) and value.on == "experts" for value in values)

    def __getattr__(self, name: str) -> Any:
        """What PEFT's object lacks is asked of the model."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name in ("model", "_whole") or name.startswith("__"):
                raise
            return getattr(self.model, name)
