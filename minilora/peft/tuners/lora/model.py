"""``peft.tuners.lora.model``."""

from minilora.peft.lora_model import LoraModel

__all__ = ["LoraModel"]
