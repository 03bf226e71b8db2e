"""``peft.config``: there is one kind of config here."""

from minilora.lora.config import LoraConfig

__all__ = ["PeftConfig"]

PeftConfig = LoraConfig
