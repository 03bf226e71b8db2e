"""``peft.optimizers``."""

from minilora.training.optim import create_loraplus_optimizer
from minilora.training.optim_lora_fa import create_lorafa_optimizer
from minilora.training.optim_riemannian import create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
