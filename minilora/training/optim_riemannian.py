"""Riemannian preconditioned LoRA (Zhang and Pilanci 2024, arXiv 2402.02347, algorithm 1): any optimizer, on rescaled gradients.

Before each step::

    dL/dA <- (B^T B + reg I)^-1 dL/dA          dL/dB <- dL/dB (A A^T + reg I)^-1          A [r, in], B [out, r]

so that a step means the same whichever of the two factors holds the size of the update. Next file: ``training/optim_state.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.errors import ConfigError, KindError
from minilora.lora.slots import adapters_in

__all__ = ["create_riemannian_optimizer", "factor_pairs", "precondition", "rescale_before_steps"]

Pair = tuple[nn.Parameter, nn.Parameter]


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An ``optimizer_cls`` over all that trains, which rescales the gradients of A and B of linear layers before each step.

    Embeddings, magnitudes, biases and copies are stepped as they are. The rescaling is a hook of this one optimizer: a copy of it
    (``copy.deepcopy``, ``pickle``) has none, so make it anew there and load its ``state_dict``.

    Args:
        reg: added to the diagonals, > 0. kwargs: further arguments of the optimizer.

    Raises:
        KindError: no class of optimizers. ConfigError: no pair of factors trains, or one whose step calls for a closure (LBFGS).
            In ``step``: a closure, which would compute new gradients after they were rescaled.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise KindError(f"optimizer_cls={optimizer_cls!r}: wanted a subclass of torch.optim.Optimizer, such as AdamW")
    if isinstance(reg, bool) or not isinstance(reg, (int, float)) or not 0 < reg < math.inf:
        raise ConfigError(f"reg={reg!r}: wanted a number > 0, such as 0.01")
    pairs = factor_pairs(model)
    if not pairs:
        raise ConfigError(
            "the model has no trainable lora_A/lora_B parameter pairs; inject an adapter into linear layers first"
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, whose gradients are not rescaled; take AdamW or SGD"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_cls(trained, lr=lr, **kwargs)  # type: ignore[call-arg]
    rescale_before_steps(optimizer, pairs, reg)
    return optimizer


def rescale_before_steps(optimizer: Optimizer, pairs: Sequence[Pair], reg: float) -> None:
    """Have an optimizer rescale the gradients of these pairs before each of its steps."""

    def before_step(_: Optimizer, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], named.get("closure"))):
            raise ConfigError(
                "the Riemannian optimizer does not support closures, whose gradients are not rescaled; call backward() before step()"
            )
        precondition(pairs, reg)

    optimizer.register_step_pre_hook(before_step)


def factor_pairs(model: nn.Module) -> list[Pair]:
    """``(A [r, in], B [out, r])`` of every adapted linear layer of which both train; of experts with their dimension before."""
    adapters = [adapter for adapter in adapters_in(model) if adapter.on != "convolution"]
    pairs = [(adapter._parameters.get("lora_A"), adapter._parameters.get("lora_B")) for adapter in adapters]
    return [
        (A, B)
        for A, B in pairs
        if A is not None and B is not None and A.requires_grad and B.requires_grad and A.ndim == B.ndim
    ]


@torch.no_grad()
def precondition(pairs: Sequence[Pair], reg: float) -> None:
    """Rescale ``.grad`` of each pair in place, computed in fp32 at least, in its own dtype after."""
    for A, B in pairs:
        kind = torch.promote_types(A.dtype, torch.float32)
        a, b = A.to(kind), B.to(kind)
        if A.grad is not None:
            A.grad.copy_(_inverse(b.mT @ b, reg) @ A.grad.to(kind))
        if B.grad is not None:
            B.grad.copy_(B.grad.to(kind) @ _inverse(a @ a.mT, reg))


def _inverse(gram: Tensor, reg: float) -> Tensor:
    return torch.linalg.pinv(gram + reg * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
