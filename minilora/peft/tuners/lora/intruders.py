"""``peft.tuners.lora.intruders``."""

from minilora.many.intruders import reduce_intruder_dimension

__all__ = ["reduce_intruder_dimension"]
