"""A module that is trained whole, and an embedding of which rows train, in PEFT's shape. Next file: ``peft/tree.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from minilora.lora.adapter import Adapter
from minilora.lora.slot import Slot
from minilora.lora.slots import Adapters
from minilora.lora.variants.embedding import Tied
from minilora.lora.variants.tokens import TokenRows
from minilora.peft.parts import Values
from minilora.peft.tuners.tuners_utils import BaseTunerLayer, view_of

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "is_rows",
    "rows_wrapper",
    "saved_wrapper",
]


class AuxiliaryTrainingWrapper(BaseTunerLayer, nn.Module):
    """What trains beside LoRA layers. ``original_module`` is the frozen module."""

    def get_base_layer(self) -> nn.Module:
        """The frozen module."""
        return self.slot.base

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is asked of the module."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("__") or "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["original_module"], name)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with a trained copy for each adapter: ``modules_to_save["default"]``."""

    @property
    def weight(self) -> Any:
        """Of the copy that is active."""
        return self.standing().weight

    @property
    def bias(self) -> Any:
        """Of the copy that is active."""
        return self.standing().bias


class TrainableTokensLayer(BaseTunerLayer, nn.Module):
    """The rows: ``trainable_tokens_delta["default"]``, ``[rows, dimension]``."""

    adapter_layer_names = ("trainable_tokens_delta",)

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter name to the rows that it trains."""
        return {name: getattr(value, "source", value).token_indices.tolist() for name, value in self.kept.items()}


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A table with a ``token_adapter`` beside it."""

    @property
    def weight(self) -> Any:
        """The table with the rows of the active adapters."""
        return self.standing().weight


def is_rows(value: Any) -> bool:
    """Whether this adapter trains rows of a table, or is tied to one that does."""
    return isinstance(value, TokenRows) or (isinstance(value, Tied) and isinstance(value.source, TokenRows))


def saved_wrapper(
    slot: Slot, base: nn.Module, kept: Mapping[str, nn.Module], standing: Callable[[], Any], adapters: Adapters
) -> nn.Module:
    """The ``ModulesToSaveWrapper`` of a slot; arguments as of ``lora_layer``."""
    wrapper = view_of(ModulesToSaveWrapper, slot, kept, standing, adapters)
    wrapper._modules.update(original_module=base, modules_to_save=nn.ModuleDict(dict(kept)))
    return wrapper


def rows_wrapper(
    slot: Slot, base: nn.Module, kept: Mapping[str, Adapter], standing: Callable[[], Any], adapters: Adapters
) -> nn.Module:
    """The ``TrainableTokensWrapper`` of a slot; arguments as of ``lora_layer``."""
    layer = view_of(TrainableTokensLayer, slot, kept, standing, adapters)
    own = {name: value for name, value in kept.items() if isinstance(value, TokenRows)}
    layer._modules["base_layer"] = base
    if own:
        layer._modules["trainable_tokens_delta"] = Values(own, "trainable_tokens_delta")
    wrapper = view_of(TrainableTokensWrapper, slot, kept, standing, adapters)
    wrapper._modules.update(original_module=base, token_adapter=layer)
    return wrapper
