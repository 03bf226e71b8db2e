"""``peft.tuners.lora.config``."""

from minilora.lora.config import LoraConfig
from minilora.lora.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig

__all__ = ["CordaConfig", "EvaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraRuntimeConfig"]
