"""The face that users see: ``get_peft_model`` returns the same model, its class extended in front by ``PeftModel``.

The object stays what it was (``isinstance``, ``generate``, ``Trainer``, ``torch.compile`` go on working) and gains PEFT's methods. Each
is one call of a plain function, which works on any module and can be used without this file. Next file: ``train.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora import adapted, checkpoint
from minilora.config import LoraConfig
from minilora.errors import StateError
from minilora.inject import inject
from minilora.slots import adapters_of, has_adapters

__all__ = ["PeftModel", "get_peft_model"]


class PeftModel(nn.Module):
    """What a model gains with adapters. It is never built directly: use ``get_peft_model`` or ``PeftModel.from_pretrained``."""

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to its config."""
        return adapters_of(self).configs

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter (the first, if several are active)."""
        return adapters_of(self).active[0]

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whose updates are added."""
        return list(adapters_of(self).active)

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False
    ) -> Any:
        """Load the adapter folder ``model_id`` into ``model``: active, in eval mode and frozen unless ``is_trainable``.

        Raises:
            CheckpointError: the folder and the model do not fit, by name; the model is then as it was.
        """
        if not isinstance(model, nn.Module):
            raise StateError(
                f"from_pretrained got a {type(model).__name__} first; wanted the loaded base model, then the adapter's folder"
            )
        _refuse_second(model)
        checkpoint.load_adapter(model, model_id, adapter_name, is_trainable)
        return _extend(model).train(is_trainable)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict | None = None,
    ) -> None:
        """Write adapters in PEFT's layout: "default" into the folder itself, others into a folder of their name in it.

        ``state_dict`` is what transformers' Trainer passes (the whole model's); the adapter's tensors are read from the model instead.
        """
        if not is_main_process:
            return
        for name in selected_adapters or self.peft_config:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            checkpoint.save_adapter(self, folder, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """``(trainable, all)`` parameters by PEFT's counting rule."""
        return adapted.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two counts and their ratio in PEFT's exact words."""
        trainable, every = adapted.count_parameters(self)
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}"
        )

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or the sum of several, the active and trainable one."""
        adapted.set_adapter(self, adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base model inside the block."""
        with adapted.disabled(self):
            yield

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (default: the active ones) into the weights, for speed; ``unmerge_adapter`` is exact."""
        adapted.merge(self, adapter_names)

    def unmerge_adapter(self) -> None:
        """Put the original layers back, bit by bit the same."""
        adapted.unmerge(self)

    def merge_and_unload(self, adapter_names: Sequence[str] | None = None) -> Any:
        """Fold adapters in for good and return the plain model (the same object, its class restored)."""
        if not adapters_of(self).merged:
            adapted.merge(self, adapter_names)
        return _restore(adapted.unload(self, keep_merged=True))

    def unload(self) -> Any:
        """Take the adapters out and return the plain, unchanged base model."""
        return _restore(adapted.unload(self))

    def get_base_model(self) -> Any:
        """The model itself (in PEFT it is another object; here nothing is wrapped)."""
        return self


def get_peft_model(model: Any, peft_config: LoraConfig, adapter_name: str = "default") -> Any:
    """Inject a new adapter and give the model PEFT's methods; returns the same object.

    Args:
        model: any ``nn.Module``, usually a transformers model.
        peft_config: never changed.
        adapter_name: the adapter's name.

    Raises:
        StateError: the model has adapters already (PEFT would silently reset a trained one). TargetError: as ``inject``.
    """
    _refuse_second(model)
    return _extend(inject(model, peft_config, adapter_name))


def _refuse_second(model: nn.Module) -> None:
    if has_adapters(model):
        names = list(adapters_of(model).configs)
        raise StateError(f"the model has adapters {names} already; unload() or merge_and_unload() them first")


def _extend(model: nn.Module) -> nn.Module:
    """Put ``PeftModel`` in front of the object's class, under the old name: transformers looks classes up by name."""
    old = type(model)
    model.__class__ = type(old.__name__, (PeftModel, old), {"__module__": old.__module__, "__doc__": old.__doc__})
    return model


def _restore(model: nn.Module) -> nn.Module:
    old = type(model).__mro__[2]  # (extended, PeftModel, the class it was, ...)
    model.__class__ = old
    return model
