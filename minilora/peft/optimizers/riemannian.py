"""``peft.optimizers.riemannian``."""

from minilora.training.optim_riemannian import create_riemannian_optimizer

__all__ = ["create_riemannian_optimizer"]
