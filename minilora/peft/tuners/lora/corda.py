"""``peft.tuners.lora.corda``."""

from minilora.lora.variants.corda import preprocess_corda

__all__ = ["preprocess_corda"]
