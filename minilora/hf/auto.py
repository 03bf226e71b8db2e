"""An adapter folder as a whole model: the base that its config names is loaded, and the adapter into it."""

from __future__ import annotations

import os
from typing import Any

import torch

from minilora.errors import ConfigError
from minilora.hf.load import load_model
from minilora.peft_model import PeftModel
from minilora.store.adapter_files import read_config

__all__ = ["AutoPeftModelForCausalLM"]


class AutoPeftModelForCausalLM:
    """PEFT's name for loading by adapter folder alone."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Any:
        """The base model named in the folder's config, with the adapter active. ``trust_remote_code`` as for ``hf.load_model``.

        Raises:
            ConfigError: the config names no base model. CheckpointError: that model cannot be loaded, or the adapter does not fit it.
        """
        base = read_config(folder).base_model_name_or_path
        if not base:
            raise ConfigError(
                f"{folder}: its config names no base_model_name_or_path; load the model and use PeftModel.from_pretrained"
            )
        return PeftModel.from_pretrained(load_model(base, dtype, trust_remote_code), folder, adapter_name, is_trainable)
