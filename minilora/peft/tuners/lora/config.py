"""``peft.tuners.lora.config``."""

from minilora.lora.config import LoraConfig
from minilora.lora.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig

__all__ = ["CordaConfig", "EvaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig"]
