"""LoRA-FA's optimizer (Zhang et al. 2023, arXiv 2308.03303): A is frozen, and the gradient of B projected.

Of all steps that B can take, AdamW gets the one whose change of ``s B A`` is closest to the gradient of the whole weight::

    argmin_G |s G A - dL/dW|  =  (1 / s^2) (dL/dB) (A A^T)^-1          A [r, in], B [out, r], both of any further dimensions flattened

On an embedding A starts at zero and B random, so B is the frozen one there and A the trained: ``(1 / s^2) (B^T B)^-1 (dL/dA)``. (PEFT
freezes neither and steps B only, whose gradient is zero as long as A is; so nothing of an embedding ever trains in it.)

In a run (``optimizer="lora_fa"``) A is frozen until the run ends. Next file: ``training/optim_riemannian.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.errors import ConfigError, warn
from minilora.lora.slots import adapters_in, adapters_of
from minilora.training.optim_closure import loss_again

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "freeze_for_good", "frozen_beside", "lorafa_group"]

_DAMPING = 1e-8  # on the diagonal of A A^T
# The factor that trains to the one that is frozen beside it.
_FROZEN_BESIDE = {"lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}


class LoraFAOptimizer(Optimizer):
    """AdamW, with the gradient of each trained factor projected as above; what has no factor beside it is stepped as it is.

    Args:
        params: groups that have, beside ``params``, the lists ``names`` and ``scaling_factors`` of the same length: a parameter's dotted
            name, in which the part ``lora_B`` (``lora_embedding_A``) says what it is, and the scaling of its layer or None. ``experts``
            may list the names of factors that are those of several experts.
        lr, betas, eps, weight_decay, correct_bias: as in AdamW; the decay is decoupled and comes after the step.

    Raises:
        ConfigError: a number outside of its range, or a group without those lists.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr={lr!r}, betas={betas!r}, eps={eps!r}: wanted lr and eps >= 0 and betas in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if any(len(group.get(key, ())) != len(group["params"]) for key in ("names", "scaling_factors")):
                raise ConfigError(
                    "a group of LoRA-FA wants 'names' and 'scaling_factors', one for each parameter; create_lorafa_optimizer makes them"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` computes the loss again, which is returned."""
        loss = loss_again(closure)
        for group in self.param_groups:
            by_name = dict(zip(group["names"], group["params"], strict=True))
            experts = group.get("experts", ())
            for name, parameter, scaling in zip(group["names"], group["params"], group["scaling_factors"], strict=True):
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                frozen = None if scaling is None else by_name.get(_frozen_beside(name))
                grad = (
                    parameter.grad
                    if frozen is None
                    else _projected(name, parameter.grad, frozen, scaling, name in experts)
                )
                self._adamw(parameter, grad, group)
        return loss

    def _adamw(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        (first, second), size = group["betas"], group["lr"]
        state["exp_avg"].mul_(first).add_(grad, alpha=1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        if group["correct_bias"]:
            size *= math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _frozen_beside(name: str) -> str:
    """The name of the factor beside this one, or "" if it is no factor that trains."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part in _FROZEN_BESIDE:
            return ".".join((*parts[:at], _FROZEN_BESIDE[part], *parts[at + 1 :]))
    return ""


def _projected(name: str, grad: Tensor, frozen: Tensor, scaling: float, each: bool = False) -> Tensor:
    """The gradient of a factor, projected as the head of this file says, in its own dtype and shape; of experts (``each``) one by one."""
    if each:
        steps = [_projected(name, *one, scaling) for one in zip(grad, frozen, strict=True)]
        return torch.stack(steps)
    wide, other = grad.float().flatten(1), frozen.float().flatten(1)
    on_tokens = "lora_embedding_A" in name.split(".")
    gram = other.T @ other if on_tokens else other @ other.T
    inverse = torch.linalg.pinv(gram + _DAMPING * torch.eye(len(gram), device=gram.device))
    step = inverse @ wide if on_tokens else wide @ inverse
    return (step / scaling**2).view_as(grad).to(grad.dtype)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int | float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze A of every adapted layer (B of an embedding) and return the optimizer for the rest.

    Args:
        r, lora_alpha: of the active adapter, as in PEFT. What counts is each layer's own scaling, so other values get a warning.
        lr, weight_decay: as in AdamW.
        use_rslora: deprecated, as in PEFT: the config says it.

    Raises:
        ConfigError: ``use_rslora`` is not what the active adapters' configs say. StateError: the model has no adapter.
    """
    record = adapters_of(model)
    for name in record.active:
        config = record.configs[name]
        if use_rslora is not None and config.use_rslora != use_rslora:
            raise ConfigError(
                f"use_rslora={use_rslora} was passed to create_lorafa_optimizer and adapter {name!r} has {config.use_rslora}; leave "
                "it out, the config says it"
            )
        if (r, lora_alpha) != (config.r, config.lora_alpha):
            warn(
                f"r={r}, lora_alpha={lora_alpha}: adapter {name!r} has r={config.r}, lora_alpha={config.lora_alpha}, and these count"
            )
    if use_rslora is not None:
        warn("use_rslora of create_lorafa_optimizer is deprecated; the adapter's config says it", FutureWarning)
    pairs = list(_pairs(adapters_in(model)))
    for _, beside, *_ in pairs:
        beside.requires_grad_(False)
    return LoraFAOptimizer([_group(model.named_parameters(), pairs)], lr=lr, weight_decay=weight_decay)


# ---- in a run


@contextmanager
def frozen_beside(model: nn.Module) -> Iterator[None]:
    """Inside the block A does not train where B does (of an embedding the other way round); after it, it is as before."""
    frozen = [beside for _, beside, *_ in _pairs(adapters_in(model)) if beside.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def freeze_for_good(adapters: Iterable[nn.Module]) -> None:
    """What ``frozen_beside`` freezes, of these adapters and with no way back: for those that nobody trains otherwise afterwards."""
    for _, beside, *_ in list(_pairs(adapters)):
        beside.requires_grad_(False)


def lorafa_group(model: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The group of ``LoraFAOptimizer`` for the parameters that train, by name, and those that are frozen beside them.

    Raises:
        ConfigError: no factor trains beside one that is frozen.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    pairs = [pair for pair in _pairs(adapters_in(model)) if id(pair[0]) in names]
    if not pairs:
        raise ConfigError(
            "optimizer='lora_fa': no lora_B trains beside a lora_A here, whose gradient it corrects; take adamw"
        )
    beside = {_frozen_beside(names[id(factor)]): other for factor, other, *_ in pairs}
    return _group([*named.items(), *beside.items()], pairs)


Pair = tuple[nn.Parameter, nn.Parameter, float, bool]


def _pairs(adapters: Iterable[nn.Module]) -> Iterator[Pair]:
    """``(trained, frozen, scaling, whether of experts)`` of each: the factors that train beside another one, in one layer."""
    for module in adapters:
        if not isinstance(scaling := getattr(module, "scaling", None), (int, float)):
            continue
        own = module._parameters
        for trained, frozen in _FROZEN_BESIDE.items():
            factor, beside = own.get(trained), own.get(frozen)
            if factor is not None and beside is not None and factor.requires_grad:
                yield factor, beside, float(scaling), getattr(module, "on", "") == "experts"


def _group(named: Iterable[tuple[str, nn.Parameter]], pairs: Iterable[Pair]) -> dict[str, Any]:
    known = list(pairs)
    scaling = {id(factor): pair[2] for pair in known for factor in pair[:2]}
    experts = {id(factor) for *factors, _, each in known for factor in factors if each}
    held = list(named)
    return {
        "params": [parameter for _, parameter in held],
        "names": [name for name, _ in held],
        "scaling_factors": [scaling.get(id(parameter)) for _, parameter in held],
        "experts": [name for name, parameter in held if id(parameter) in experts],
    }
