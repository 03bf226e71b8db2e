"""``peft.optimizers.lorafa``."""

from minilora.training.optim_lora_fa import LoraFAOptimizer, create_lorafa_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer"]
