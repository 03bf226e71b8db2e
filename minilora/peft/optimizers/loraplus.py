"""``peft.optimizers.loraplus``."""

from minilora.training.optim import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer"]
