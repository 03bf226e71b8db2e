"""What a model answers about its adapters: configs, which are active, how much trains. Next file: ``peft/many.py``."""

from __future__ import annotations

from typing import Any

from minilora.lora.config import LoraConfig
from minilora.lora.slots import adapters_of
from minilora.many import adapted
from minilora.peft.shape import Shape
from minilora.peft.status import get_layer_status, get_model_status

__all__ = ["Facts"]


class Facts(Shape):
    """The part of ``PeftModel`` that changes nothing."""

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to its config."""
        return adapters_of(self).configs

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter (the first, if several are active)."""
        return next(iter(adapters_of(self).active), "")

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whose updates are added."""
        return list(adapters_of(self).active)

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        """``PeftType.LORA``."""
        return self.active_peft_config.peft_type

    @property
    def prefix(self) -> str:
        """What the names of trained parameters begin with, as PEFT has it: ``lora_``, and of VeRA ``vera_lambda_``."""
        return self.active_peft_config.prefix

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers that have an adapter."""
        return self.base_model.targeted_module_names

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the weights of experts and routers that have an adapter."""
        return self.base_model.targeted_parameter_names

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that train whole, of all adapters."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The model's dtype."""
        return getattr(self, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in a forward."""
        return not adapters_of(self).is_bare

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update can be written as a plain LoRA."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """``(trainable, all)`` parameters by PEFT's counting rule."""
        return adapted.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two counts and their ratio in PEFT's exact words."""
        trainable, every = adapted.count_parameters(self)
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}"
        )

    def get_layer_status(self) -> Any:
        """What each adapted layer holds; as ``minilora.peft.get_layer_status``."""
        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """What the model holds; as ``minilora.peft.get_model_status``."""
        return get_model_status(self)
