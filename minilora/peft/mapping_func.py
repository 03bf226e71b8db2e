"""``peft.mapping_func``."""

from minilora.peft.peft_model import get_peft_model

__all__ = ["get_peft_model"]
