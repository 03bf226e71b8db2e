"""``peft.tuners.lora.conversion``."""

from minilora.many.convert import convert_to_lora, save_as_lora

__all__ = ["convert_to_lora", "save_as_lora"]
