"""A new adapter from several: weighted sums, concatenations, and the pruned and sign-elected sums of TIES and DARE.

    cat      A stacked, B stacked: exactly the weighted sum of the updates, at the sum of the ranks
    svd      the best rank-r part of the weighted sum
    linear   sums A and B apart; cross terms make it another thing than the sum of the updates (PEFT's definition, kept)
    ties, dare_linear, dare_ties, magnitude_prune   as linear, after pruning; with _svd on the dense updates, then as svd

TIES: Yadav et al. 2023, arXiv 2306.01708, section 3. DARE: Yu et al. 2023, arXiv 2311.03099, section 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, StateError, nearest
from minilora.files import validate
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.inject import build, place
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import Value
from minilora.lora.slots import Adapters, adapters_of
from minilora.lora.targets import exactly
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.lora.variants.residual import ResidualLoRA

__all__ = ["COMBINATIONS", "add_weighted_adapter"]

# Name -> (how the summands are pruned, whether the majority sign is elected); "cat" has a rule of its own.
_SUMS = {
    "linear": (None, False),
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
COMBINATIONS = ("cat", "svd", *_SUMS, *(f"{name}_svd" for name in _SUMS if name != "linear"))


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Make adapter ``adapter_name`` from others and keep it aside, frozen. Its scaling is 1, whatever theirs is.

    Args:
        adapters, weights: names and factors, which may be negative.
        combination_type: one of COMBINATIONS.
        svd_rank: rank for "svd" and the ``_svd`` forms; default the largest rank of the adapters.
        density: share of values that pruning keeps, in (0, 1].
        majority_sign_method: "total" or "frequency", for the forms with "ties".

    Raises:
        ConfigError: an argument that cannot be meant. StateError: an unknown or taken name, ranks that differ where they must not, or
            adapters that are more than low-rank updates (DoRA, copies of modules, trained biases). Nothing has changed then.
    """
    record = adapters_of(model)
    _check(record, adapters, weights, combination_type, density, majority_sign_method)
    by_path: dict[str, list[tuple[Adapter, float]]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for path, value in record.named(name).items():
            by_path.setdefault(path, []).append((_plain(value, name, path), float(weight)))
    rank = _rank(record, adapters, by_path, combination_type, svd_rank)
    config = dataclasses.replace(
        record.configs[adapters[0]],
        r=rank,
        lora_alpha=rank,
        target_modules=exactly(tuple(by_path), [path for path, _ in Bare(model).named_modules() if path]),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,  # or the scaling would be sqrt(r) instead of 1
        init_lora_weights=True,
    )
    values = build(model, config, adapter_name, "lora")
    with torch.no_grad():
        for path, value in values.items():
            _fill(value, by_path[path], combination_type, density, majority_sign_method)
    place(model, config, adapter_name, values, "lora", activate=False)


def _check(
    record: Adapters,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination: str,
    density: float | None,
    majority: str,
) -> None:
    record.check(adapters)
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights: wanted one weight for each adapter")
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={list(weights)!r}: wanted finite numbers")
    if combination not in COMBINATIONS:
        raise ConfigError(
            f"combination_type={combination!r} is not known; the closest are {nearest(combination, COMBINATIONS)}"
        )
    prunes = combination not in ("cat", "svd", "linear")
    if prunes and (not isinstance(density, (int, float)) or not 0 < density <= 1):
        raise ConfigError(f"density={density!r}: {combination} prunes; wanted the share of values to keep, in (0, 1]")
    if majority not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method={majority!r}: wanted 'total' or 'frequency'")


def _plain(value: Value, name: str, path: str) -> Adapter:
    """The adapter if it is nothing but a low-rank update."""
    if not isinstance(value, (LoRALinear, LoRAEmbedding)):
        raise StateError(
            f"adapter {name!r} trains a copy or rows of {path}, which cannot be combined; merge the adapters one by one"
        )
    if getattr(value.innermost, "groups", 1) > 1:
        raise StateError(
            f"{path}: its convolution has groups, and the factors of several adapters cannot be put together there; merge them one by one"
        )
    try:
        value.as_lora()
    except StateError as error:
        raise StateError(f"adapter {name!r}, {path}: {error}") from None
    return value


def _rank(
    record: Adapters,
    adapters: Sequence[str],
    by_path: dict[str, list[tuple[Adapter, float]]],
    combination: str,
    svd_rank: int | None,
) -> int:
    ranks = {path: [len(adapter.as_lora()[0]) for adapter, _ in parts] for path, parts in by_path.items()}
    if combination == "cat":
        return max(sum(each) for each in ranks.values())
    largest = max(max(each) for each in ranks.values())
    started = [
        path for path, parts in by_path.items() if any(isinstance(adapter, ResidualLoRA) for adapter, _ in parts)
    ]
    if started and not combination.endswith("svd"):
        raise StateError(
            f"{started[0]}: PiSSA and OLoRA factors count from their start; {combination} adds factors, use 'cat' or 'svd'"
        )
    if combination.endswith("svd"):
        if svd_rank is not None:
            validate.whole("svd_rank", svd_rank, 1)
        return svd_rank or largest
    for path, each in ranks.items():
        if set(each) != {largest}:
            raise StateError(
                f"{path}: ranks {each}, largest {largest}; {combination} wants equal ranks, use 'cat' or 'svd' instead"
            )
    return largest


def _fill(
    target: Value, parts: Sequence[tuple[Adapter, float]], combination: str, density: float | None, majority: str
) -> None:
    """Write the combination of ``parts`` into the factors of a new adapter whose scaling is 1."""
    own_A, own_B = _factors(target)
    weights = [weight for _, weight in parts]
    if combination == "cat":
        low = [_scaled_factors(adapter) for adapter, _ in parts]
        A = torch.cat([weight * a for (_, weight), (a, _) in zip(parts, low, strict=True)])
        B = torch.cat([b for _, b in low], 1)
    elif combination.endswith("svd"):
        rule = _SUMS[combination.removesuffix("svd").rstrip("_") or "linear"]
        dense = [_dense(adapter) for adapter, _ in parts]
        U, S, Vh = torch.linalg.svd(_sum(dense, weights, *rule, density, majority), full_matrices=False)
        A, B = Vh[: len(own_A)], U[:, : len(own_A)] * S[: len(own_A)]
    else:
        rule = _SUMS[combination]
        scaled = [weight * _scaling(adapter) for adapter, weight in parts]
        roots = [math.sqrt(abs(each)) for each in scaled]
        signed = [math.copysign(root, each) for root, each in zip(roots, scaled, strict=True)]
        A = _sum([_factors(adapter)[0] for adapter, _ in parts], signed, *rule, density, majority)
        B = _sum([_factors(adapter)[1] for adapter, _ in parts], roots, *rule, density, majority)
    own_A.zero_()[: len(A)] = A
    own_B.zero_()[:, : B.shape[1]] = B


def _factors(value: Value) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])`` as they are stored; of an embedding ``(A [r, tokens], B [dimension, r])``."""
    if isinstance(value, LoRAEmbedding):
        return value.lora_embedding_A.data, value.lora_embedding_B.data
    if isinstance(value, LoRALinear):
        return value.lora_A.data.flatten(1), value.lora_B.data.flatten(
            1
        )  # views: of a convolution too they are written to
    raise StateError(f"{type(value).__name__} has no low-rank factors")


def _scaled_factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """``(A, B)`` in the orientation of the stored factors, with ``B A`` the whole update, start factors included."""
    A, B = adapter.as_lora()
    return (B.T, A.T) if isinstance(adapter, LoRAEmbedding) else (A, B)


def _scaling(adapter: Any) -> float:
    return adapter.scaling


def _dense(adapter: Adapter) -> Tensor:
    """``scaling * B A`` in the orientation of the stored factors."""
    delta = adapter.delta_weight()
    return delta.T if isinstance(adapter, LoRAEmbedding) else delta


def _sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    pruning: str | None,
    elect: bool,
    density: float | None,
    majority: str,
) -> Tensor:
    """The weighted sum of pruned tensors; with ``elect`` only of values with the majority's sign, divided by their number."""
    stack = torch.stack([_pruned(tensor, pruning, density or 1.0) for tensor in tensors])
    factor = torch.tensor(list(weights), dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
    if not elect:
        return (stack * factor).sum(0)
    votes = stack.sum(0) if majority == "total" else stack.sign().sum(0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    return (stack * factor * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, pruning: str | None, density: float) -> Tensor:
    """Keep the share ``density`` of the values: the largest, or random ones scaled up to the same mean."""
    if pruning is None or density == 1:
        return tensor
    if pruning == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)
