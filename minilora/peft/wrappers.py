"""A module that is trained whole, and an embedding of which rows train, in PEFT's shape. Next file: ``peft/faces.py``."""

from __future__ import annotations

from typing import Any

from torch import nn

from minilora.lora.change import Change
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters
from minilora.lora.variants.embedding import Tied
from minilora.lora.variants.tokens import TokenRows
from minilora.peft import parts
from minilora.peft.base import BaseTunerLayer, face_of

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "is_rows",
    "rows_wrapper",
    "saved_wrapper",
]


class AuxiliaryTrainingWrapper(BaseTunerLayer):
    """What trains beside LoRA layers. ``original_module`` is the frozen module."""

    @property
    def _adapters(self) -> set[str]:
        """Names of the adapters that train something here."""
        return set(self.kept)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active and train something here."""
        return [name for name in super().active_adapters if name in self.kept]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names of an adapter's tensors in a file to their names in this module, both below its path."""
        return {}


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with a trained copy for each adapter: ``modules_to_save["default"]``."""

    def stand_on(self, change: Change, base: nn.Module) -> None:
        """As of the base class."""
        change.item(self._modules, "original_module", base)

    def enter(self, change: Change, name: str, value: Any) -> None:
        """As of the base class."""
        change.item(self.kept, name, value)
        change.item(self.modules_to_save._modules, name, value)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As of the base class."""
        names = self.kept[adapter_name].state_dict() if adapter_name in self.kept else ()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in names}


class TrainableTokensLayer(BaseTunerLayer):
    """The rows: ``trainable_tokens_delta["default"]``, ``[rows, dimension]``."""

    adapter_layer_names = ("trainable_tokens_delta",)

    def enter(self, change: Change, name: str, value: Any) -> None:
        """As of the base class; rows that are tied to another table's are shown, and are no parameters here."""
        change.item(self.kept, name, value)
        rows = parts.dictionary(change, self, "trainable_tokens_delta", parts.Values)
        rows.enter(change, name, value, "trainable_tokens_delta")

    @property
    def token_indices(self) -> Any:
        """Adapter name to the rows that it trains."""
        return parts.Field(
            self.kept, lambda name: getattr(self.kept[name], "source", self.kept[name]).token_indices.tolist()
        )

    @property
    def trainable_tokens_original(self) -> Any:
        """Adapter name to the rows as the base model has them, ``[rows, dimension]``."""
        return parts.Field(self.kept, lambda name: self.slot.base.weight[self.token_indices[name]].detach())


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A table with a ``token_adapter``, in which alone it has its parameters, as in PEFT.

    TRL sends all parameters to vLLM but those of an ``original_module``: under that name a table would not be sent.
    """

    @property
    def original_module(self) -> nn.Module:
        """The frozen table."""
        return self.token_adapter.base_layer

    def enter(self, change: Change, name: str, value: Any) -> None:
        """As of the base class."""
        change.item(self.kept, name, value)
        self.token_adapter.enter(change, name, value)

    def leave(self, change: Change, name: str) -> None:
        """As of the base class."""
        change.drop(self.kept, name)
        self.token_adapter.leave(change, name)

    def stand_on(self, change: Change, base: nn.Module) -> None:
        """As of the base class."""
        self.token_adapter.stand_on(change, base)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As of the base class; a table that is tied to another has no tensor of its own."""
        if not isinstance(self.kept.get(adapter_name), TokenRows):
            return {}
        return {"token_adapter.trainable_tokens_delta": f"token_adapter.trainable_tokens_delta.{adapter_name}"}


def is_rows(value: Any) -> bool:
    """Whether this adapter trains rows of a table, or is tied to one that does."""
    return isinstance(value, TokenRows) or (isinstance(value, Tied) and isinstance(value.source, TokenRows))


def saved_wrapper(slot: Slot, base: nn.Module, adapters: Adapters) -> nn.Module:
    """The ``ModulesToSaveWrapper`` of a slot; arguments as of ``lora_layer``."""
    wrapper = face_of(ModulesToSaveWrapper, slot, adapters)
    wrapper._modules.update(original_module=base, modules_to_save=nn.ModuleDict())
    return wrapper


def rows_wrapper(slot: Slot, base: nn.Module, adapters: Adapters) -> nn.Module:
    """The ``TrainableTokensWrapper`` of a slot; arguments as of ``lora_layer``."""
    layer = face_of(TrainableTokensLayer, slot, adapters)
    layer._modules["base_layer"] = base
    wrapper = face_of(TrainableTokensWrapper, slot, adapters)
    wrapper._modules["token_adapter"] = layer
    return wrapper
