"""``peft.tuners.lora.eva``."""

from minilora.many.eva import get_eva_state_dict, initialize_lora_eva_weights

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights"]
