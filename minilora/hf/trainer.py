"""transformers' Trainer with adapters: checkpoints hold the adapter alone, resume and best-model loading are exact.

Without this a plain Trainer trains an adapted model, and ``save_pretrained`` writes the adapter; only resuming from a checkpoint and
``load_best_model_at_end`` need to know that a checkpoint holds no base model. Mix ``LoraTrainerMixin`` in front of any Trainer, TRL's
SFTTrainer included. The three methods are private to transformers; 5.24 is what the tests run with.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

import transformers
from torch import nn

from minilora.lora.slots import adapters_of
from minilora.store.load import restore_adapter

__all__ = ["LoraTrainer", "LoraTrainerMixin"]


class LoraTrainerMixin:
    """Saves, resumes and restores adapters; put it in front: ``class Mine(LoraTrainerMixin, SFTTrainer)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self._adapted()
        forward = vars(model).get("forward")
        # TRL binds a forward of its own, which calls the model's base_model: transformers' meaning of it, not PEFT's.
        if isinstance(forward, MethodType) and forward.__self__ is model and hasattr(model, "get_base_model"):
            vars(model)["forward"] = MethodType(forward.__func__, model.get_base_model())

    def _adapted(self) -> nn.Module:
        """The model under whatever accelerate wrapped around it."""
        trainer: Any = self
        return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint: every adapter in PEFT's layout, and what transformers keeps beside it."""
        super()._save(output_dir, state_dict={})  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        self._restore(trainer.state.best_model_checkpoint)

    def _restore(self, folder: str) -> None:
        model = self._adapted()
        for name in adapters_of(model).configs:
            restore_adapter(model, folder if name == "default" else os.path.join(folder, name), name)


class LoraTrainer(LoraTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` for a model with adapters."""
