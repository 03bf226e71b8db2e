"""The optimizer of a run: the one that its config names, for what trains of a model. Next file: ``training/optim.py``.

Most optimizers take parameters and no more (``training/optim.py``). Two look at what a parameter is: Muon steps matrices alone, and LoRA-FA
reads the A beside a B. LoRA+ and Riemannian preconditioning change any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim import Optimizer

from minilora.errors import ConfigError
from minilora.training.optim import make_optimizer, output_side, rate_groups
from minilora.training.optim_lora_fa import LoraFAOptimizer, freeze_for_good, frozen_beside, lorafa_group
from minilora.training.optim_muon import MuonWithAdamW, factors_for_muon, refuse_without_muon
from minilora.training.optim_riemannian import factor_pairs, rescale_before_steps
from minilora.training.settings import TrainConfig

__all__ = ["as_trained", "freeze_beside", "optimizer_of", "refuse_optimizer"]


def as_trained(model: nn.Module, config: TrainConfig) -> AbstractContextManager[None]:
    """Inside the block what this config's optimizer would not train is frozen: A, with LoRA-FA."""
    return frozen_beside(model) if config.optimizer == "lora_fa" else nullcontext()


def freeze_beside(adapters: Iterable[nn.Module], config: TrainConfig) -> None:
    """As ``as_trained``, of these adapters alone and with no way back."""
    if config.optimizer == "lora_fa":
        freeze_for_good(adapters)


def refuse_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Raise what ``optimizer_of`` would raise of this device and of the packages here, before there is a model."""
    if config.optimizer == "muon":
        refuse_without_muon()
    elif config.optimizer != "lora_fa":  # which is ours, and for any device
        make_optimizer(config, [nn.Parameter(torch.zeros(1, device=device))])


def optimizer_of(model: nn.Module, named: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer that a config asks for, for the parameters that train, by name; inside ``as_trained``.

    Raises:
        ConfigError: LoRA+ without a B that trains, Riemannian preconditioning without a pair of A and B, Muon without a matrix, LoRA-FA
            without a B beside an A; or as ``make_optimizer``.
    """
    fast = output_side(named) if config.loraplus_lr_ratio != 1 else []
    if config.loraplus_lr_ratio != 1 and not fast:
        raise ConfigError(
            f"loraplus_lr_ratio={config.loraplus_lr_ratio}: no lora_B trains here, whose rate that is; leave it at 1"
        )
    optimizer = _made(model, named, fast, config)
    if config.riemannian_reg:
        if not (pairs := factor_pairs(model)):
            raise ConfigError(
                f"riemannian_reg={config.riemannian_reg}: no pair of lora_A and lora_B trains here; leave it at 0"
            )
        rescale_before_steps(optimizer, pairs, config.riemannian_reg)
    return optimizer


def _made(
    model: nn.Module, named: Mapping[str, nn.Parameter], fast: list[nn.Parameter], config: TrainConfig
) -> Optimizer:
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "muon":
        matrices = factors_for_muon(named)
        taken = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in named.values() if id(parameter) not in taken]
        groups, rest = (rate_groups(config, some, fast) for some in (matrices, others))
        return MuonWithAdamW(groups, rest, lr=lr, weight_decay=decay)
    if config.optimizer == "lora_fa":
        return LoraFAOptimizer([lorafa_group(model, named) | {"lr_ratio": 1.0}], lr=lr, weight_decay=decay)
    return make_optimizer(config, list(named.values()), fast)
