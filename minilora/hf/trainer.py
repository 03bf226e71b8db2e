"""transformers' and TRL's trainers with adapters: checkpoints hold the adapter alone, resume and best-model loading are exact.

Without this a plain Trainer trains an adapted model, and ``save_pretrained`` writes the adapter; only resuming from a checkpoint and
``load_best_model_at_end`` need to know that a checkpoint holds no base model. Mix ``LoraTrainerMixin`` in front of any Trainer, TRL's
included: its DPO, KTO, GRPO and RLOO get their reference from the adapted model itself (``hf/began.py``). The three methods are
private to transformers; 5.24, and 1.16 of TRL, are what the tests run with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from minilora.errors import CheckpointError
from minilora.hf.preferences import asked_of, take_config, take_reference
from minilora.lora.slots import adapters_of
from minilora.many.frozen import REF
from minilora.store.adapter_files import CONFIG_FILE
from minilora.store.load import restore_adapter

__all__ = ["LoraTrainer", "LoraTrainerMixin"]


class LoraTrainerMixin:
    """Saves, resumes and restores adapters; put it in front: ``class Mine(LoraTrainerMixin, SFTTrainer)``.

    ``peft_config=minilora.LoraConfig(...)`` adapts the model that the trainer gets. A trainer that compares with a reference (TRL's DPO,
    KTO, GRPO, RLOO) gets ``minilora.hf.reference(model)`` unless it was given a ``ref_model``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        asked = asked_of(type(self), LoraTrainerMixin, args, kwargs)
        take_config(asked)
        taken = take_reference(type(self), asked)
        with taken:
            super().__init__(**asked)
        taken.put(self)

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
        names = adapters_of(model).configs
        known = [path.parent.name for path in Path(folder).glob(f"{REF}*/{CONFIG_FILE}")]
        if left := sorted(name for name in known if name not in names):
            raise CheckpointError(
                f"{folder}: its run began from an adapter that had learnt something, kept as {left[0]!r}, and this model began without; "
                "load the adapter that the run began from (is_trainable=True) before the trainer gets the model"
            )
        for name in names:
            restore_adapter(model, folder if name == "default" else os.path.join(folder, name), name)


class LoraTrainer(LoraTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` for a model with adapters."""
