"""``peft.tuners.lora.config``."""

from minilora.lora.config import LoraConfig

__all__ = ["LoraConfig"]
