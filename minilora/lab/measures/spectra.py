"""The singular values of each layer's update, and two numbers that say how many of them count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.files import validate
from minilora.lab.measures.subject import fixed_updates
from minilora.lora import update
from minilora.lora.adapter import Adapter

__all__ = ["effective_rank", "spectrum", "stable_rank"]


@overload
def spectrum(what: Adapter) -> Tensor: ...  # type: ignore[overload-overlap]
@overload
def spectrum(what: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]: ...
def spectrum(what: nn.Module, adapter_name: str = "default") -> Tensor | dict[str, Tensor]:
    """Singular values of the update, largest first, in fp32: of one adapted layer, or by path of every layer of a model (of experts by
    path and number, as ``experts.down_proj[3]``).

    Where the update has a low rank (``lora.update.low_rank``), they come from its factors, O((in + out) r^2), and there are
    ``min(r, in, out)``; otherwise (DoRA) the update is formed, and there are ``min(in, out)``. Scaling is included.

    Raises:
        StateError: no such adapter, or an update that is another one for each input (aLoRA).
    """
    if isinstance(what, Adapter):
        return update.spectrum(what)
    each = [update.spectra_at(path, adapter) for path, adapter in fixed_updates(what, adapter_name).items()]
    return {name: values for found in each for name, values in found.items()}


def effective_rank(values: Tensor | Sequence[float]) -> float:
    """``exp(-sum p log p)`` with ``p`` the singular values divided by their sum (Roy & Vetterli 2007, "The effective rank", equation 4).

    Between 1 and the rank; as many equal singular values as this have the same entropy. 0 for an update of zero. Raises as ``checked``.
    """
    sizes = checked(values)
    shares = sizes / sizes.sum()
    return float(torch.special.entr(shares).sum().exp()) if sizes.any() else 0.0


def stable_rank(values: Tensor | Sequence[float]) -> float:
    """``||.||_F^2 / ||.||_2^2``, the sum of the squared singular values divided by the largest (Rudelson & Vershynin 2007).

    Between 1 and the rank, and no small singular value moves it much. 0 for an update of zero. Raises as ``checked``.
    """
    sizes = checked(values)
    return float((sizes / sizes.max()).square().sum()) if sizes.any() else 0.0


def checked(values: Tensor | Sequence[float]) -> Tensor:
    """Singular values in fp64. Raises ``ConfigError`` where they are none: no list of finite numbers of at least 0."""
    sizes = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if sizes.dim() != 1 or not len(sizes) or not bool((sizes.isfinite() & (sizes >= 0)).all()):
        raise ConfigError(f"values={validate.shown(values)}: wanted singular values, a list of finite numbers >= 0")
    return sizes
