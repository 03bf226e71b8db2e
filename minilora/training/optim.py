"""Optimizers: the one that a run asks for by name, and LoRA+.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4): B trains with a higher rate than A. Next file: ``training/optim_closure.py``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from minilora.errors import ConfigError, StateError
from minilora.lora.slots import adapters_in
from minilora.training.optim_adamw8 import AdamW8bit
from minilora.training.optim_bnb import BNB, bnb_optimizer
from minilora.training.settings import TrainConfig

__all__ = ["create_loraplus_optimizer", "lora_plus_groups", "make_optimizer", "output_side", "rate_groups"]

_MOMENTUM = 0.9  # the usual one: a step of LoRA sees few examples, and without it goes where the last of them point


def make_optimizer(
    config: TrainConfig, parameters: Sequence[nn.Parameter], fast: Sequence[nn.Parameter] = ()
) -> Optimizer:
    """The optimizer that ``config.optimizer`` names, for these parameters.

    "adamw" is torch's, one kernel for all parameters where they are on a GPU; "adamw8" is ``AdamW8bit``; "sgd" is torch's with momentum
    0.9; the others are bitsandbytes'. What has to know names or the model ("muon", "lora_fa") is made in ``training/optim_choice.py``.

    Args:
        fast: those of the parameters whose rate is ``config.loraplus_lr_ratio`` times ``lr``; each group has its "lr_ratio".

    Raises:
        MissingPackageError: bitsandbytes is asked for and not installed. ConfigError: it has no code for this device.
    """
    groups, lr, decay = rate_groups(config, parameters, fast), config.lr, config.weight_decay
    if config.optimizer in BNB:
        return bnb_optimizer(config.optimizer, groups, lr=lr, weight_decay=decay)
    if config.optimizer == "adamw8":
        return AdamW8bit(groups, lr=lr, weight_decay=decay)
    if config.optimizer == "sgd":
        return SGD(groups, lr=lr, momentum=_MOMENTUM, weight_decay=decay)
    fused = True if all(parameter.is_cuda for parameter in parameters) else None  # None: as torch chooses
    return AdamW(groups, lr=lr, weight_decay=decay, fused=fused)


def rate_groups(
    config: TrainConfig, parameters: Sequence[nn.Parameter], fast: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Groups of these parameters by their rate, none of them empty. ``fast`` is as for ``make_optimizer``, and may name others too."""
    taken = {id(parameter) for parameter in fast}
    slow = [parameter for parameter in parameters if id(parameter) not in taken]
    own = [parameter for parameter in parameters if id(parameter) in taken]
    ratios = ((slow, 1.0), (own, config.loraplus_lr_ratio))
    return [{"params": some, "lr": config.lr * ratio, "lr_ratio": ratio} for some, ratio in ratios if some]


def output_side(named: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters on the output side of an update: B and its bias. On an embedding A holds one column a token, and B projects it."""
    return [p for name, p in named.items() if name.rpartition(".")[2] in ("lora_B", "lora_embedding_B", "lora_bias")]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: B (and other output-side factors) at ``lr * ratio``, everything else that trains at ``lr``.

    With Adam, no weight decay and no clipping of the global norm this equals plain LoRA with A drawn ``sqrt(ratio)`` times as large and
    the rate ``lr * sqrt(ratio)``.

    Raises:
        ConfigError: a rate or ratio that is not > 0. StateError: nothing trains.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        _check_rate(name, value)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise StateError("no parameter requires grad, so nothing would train; inject an adapter first")
    fast = output_side(named)
    taken = {id(parameter) for parameter in fast}
    slow = [parameter for parameter in named.values() if id(parameter) not in taken]
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [group for group in groups if group["params"]]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer with LoRA+'s rates, in the four groups that PEFT makes; an empty one stays, so that their places are the same.

    A and all else at ``lr``; factors of embeddings at ``loraplus_lr_embedding``; B, and what has one dimension, at
    ``lr * loraplus_lr_ratio``; of these, biases and the weights of ``nn.LayerNorm`` do not decay.

    Args:
        optimizer_cls: any class of torch's, or of bitsandbytes', whose 8-bit ones keep 32 bits for embeddings.
        loraplus_lr_ratio: rate of B over that of A; at least 1 is meant. loraplus_weight_decay: of all groups but the last.
        kwargs: further arguments of the optimizer.

    Raises:
        ConfigError: a rate or ratio that is not > 0.
    """
    rates = {"lr": lr, "loraplus_lr_ratio": loraplus_lr_ratio, "loraplus_lr_embedding": loraplus_lr_embedding}
    for name, value in rates.items():
        _check_rate(name, value)
    a: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    b_without_decay: list[nn.Parameter] = []
    seen: set[int] = set()
    # Adapters first: where PEFT's names stand in their places, the model's own modules call a matrix "weight".
    for module in (*adapters_in(model), *model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name.startswith("lora_embedding_"):
                embedding.append(parameter)
            elif name != "lora_B" and parameter.ndim != 1:
                a.append(parameter)
            elif "bias" in name or isinstance(module, nn.LayerNorm):
                b_without_decay.append(parameter)
            else:
                b.append(parameter)
    fast, decay = lr * loraplus_lr_ratio, loraplus_weight_decay
    groups = [
        {"params": a, "lr": lr, "weight_decay": decay},
        {"params": embedding, "lr": loraplus_lr_embedding, "weight_decay": decay},
        {"params": b, "lr": fast, "weight_decay": decay},
        {"params": b_without_decay, "lr": fast, "weight_decay": 0.0},
    ]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    package = optimizer_cls.__module__.partition(".")[0]
    if package == "bitsandbytes" and optimizer_cls.__name__.endswith("8bit"):
        manager = sys.modules[package].optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _check_rate(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name}={value!r}: wanted a number > 0; LoRA+ uses ratio=16")
