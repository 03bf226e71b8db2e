"""The optimizer of a run, with what LoRA+ and Riemannian preconditioning change of it. Next file: ``training/optim.py``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from minilora.errors import ConfigError
from minilora.training.optim import make_optimizer, output_side
from minilora.training.optim_riemannian import factor_pairs, rescale_before_steps
from minilora.training.settings import TrainConfig

__all__ = ["optimizer_of"]


def optimizer_of(model: nn.Module, named: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer that a config asks for, for the parameters that train, by name.

    Raises:
        ConfigError: LoRA+ without a B that trains, or Riemannian preconditioning without a pair of A and B; or as ``make_optimizer``.
    """
    fast = output_side(named) if config.loraplus_lr_ratio != 1 else []
    if config.loraplus_lr_ratio != 1 and not fast:
        raise ConfigError(
            f"loraplus_lr_ratio={config.loraplus_lr_ratio}: no lora_B trains here, whose rate that is; leave it at 1"
        )
    optimizer = make_optimizer(config, list(named.values()), fast)
    if config.riemannian_reg:
        if not (pairs := factor_pairs(model)):
            raise ConfigError(
                f"riemannian_reg={config.riemannian_reg}: no pair of lora_A and lora_B trains here; leave it at 0"
            )
        rescale_before_steps(optimizer, pairs, config.riemannian_reg)
    return optimizer
