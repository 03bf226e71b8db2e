"""``peft.helpers``."""

from __future__ import annotations

import os

from minilora.errors import MiniLoraError
from minilora.lora.variants.dora import DoraCaching
from minilora.many.scaling import rescale_adapter_scale
from minilora.peft.hub import folder_of
from minilora.store.adapter_files import read_config

__all__ = ["DoraCaching", "check_if_peft_model", "rescale_adapter_scale"]


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or an id on the Hub, holds an adapter."""
    try:
        read_config(folder_of(model_name_or_path, {}))
    except MiniLoraError:
        return False
    return True
