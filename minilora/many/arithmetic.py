"""Sums of tensors that are all updates of one weight: weighted, pruned, and with an elected sign. The names are PEFT's.

    task_arithmetic    sum of w_i T_i
    magnitude_prune    the same of the largest values of each T_i
    dare_linear        the same of random values of each T_i, scaled up to the same mean
    ties, dare_ties    as the two before, but at each place only values of the majority's sign count, divided by their number

TIES: Yadav et al. 2023, arXiv 2306.01708, section 3. DARE: Yu et al. 2023, arXiv 2311.03099, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.errors import ConfigError

__all__ = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "reshape_weight_task_tensors",
    "task_arithmetic",
    "ties",
]


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of tensors of one shape; ``weights`` has one number for each."""
    return _weighted(torch.stack(list(task_tensors)), weights).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum after the share ``density`` of the values of each tensor, the largest, was kept."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum after random values were kept, each with probability ``density``, and divided by it."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """``magnitude_prune``, of the values with the majority's sign only, divided by how many these are."""
    return _elected([prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """``dare_linear``, of the values with the majority's sign only, divided by how many these are."""
    kept = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _elected(kept, weights, majority_sign_method)


def _elected(tensors: Sequence[Tensor], weights: Tensor, method: str) -> Tensor:
    stack = torch.stack(list(tensors))
    return disjoint_merge(_weighted(stack, weights), calculate_majority_sign_mask(stack, method))


def _weighted(stack: Tensor, weights: Tensor) -> Tensor:
    return stack * reshape_weight_task_tensors(stack, weights)


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """``weights`` with dimensions of size 1 added, so that it multiplies stacked tensors one by one."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """Zeros in the place of all values but the share ``density``; at 1 the tensor itself.

    Args:
        method: "magnitude" keeps the largest, "random" each with that probability.
        rescale: divide what is kept at random by ``density``.

    Raises:
        ConfigError: a density outside of [0, 1], another method, or a rescaling by 0.
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 <= density <= 1:
        raise ConfigError(f"density={density!r}: wanted the share of values to keep, in [0, 1]")
    if method not in ("magnitude", "random"):
        raise ConfigError(f"method={method!r}: wanted 'magnitude' or 'random'")
    if density == 1:
        return tensor
    return (
        magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)
    )


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The largest ``int(density * n)`` of n values, and zeros."""
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each value with probability ``density``, or zero; with ``rescale`` divided by it. Raises ``ConfigError`` where that is 0."""
    if rescale and density == 0:
        raise ConfigError("density=0: what is kept at random is divided by it; wanted a share > 0")
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where the stacked tensors ``[n, ...]`` have the majority's sign: of their sum ("total"), or of most of them ("frequency").

    Raises:
        ConfigError: another method.
    """
    if method not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method={method!r}: wanted 'total' or 'frequency'")
    sign = tensor.sign()
    votes = tensor.sum(0) if method == "total" else sign.sum(0)
    return sign == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over ``[n, ...]`` of the values that the mask names; zero where it names none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)
