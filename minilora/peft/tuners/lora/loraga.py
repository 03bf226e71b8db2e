"""``peft.tuners.lora.loraga``."""

from minilora.lora.variants.lora_ga import preprocess_loraga

__all__ = ["preprocess_loraga"]
