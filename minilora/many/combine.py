"""A new adapter from several: weighted sums, concatenations, and the pruned and sign-elected sums of TIES and DARE.

    cat      A stacked, B stacked: exactly the weighted sum of the updates, at the sum of the ranks
    svd      the best rank-r part of the weighted sum
    linear   sums A and B apart; cross terms make it another thing than the sum of the updates (PEFT's definition, kept)
    ties, dare_linear, dare_ties, magnitude_prune   as linear, after pruning; with _svd on the dense updates, then as svd

Token rows and biases that train are summed as updates, whatever the way: ``base + sum of weight * (trained - base)``. A copy of a module
that one of the adapters trains is taken as it is. Next file: ``many/arithmetic.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, StateError, nearest
from minilora.files import validate
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.inject import build, place
from minilora.lora.layer import LoRALinear
from minilora.lora.match import targets_of
from minilora.lora.slot import Value, own_parameters
from minilora.lora.slots import Adapters, adapters_of
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.lora.variants.experts import LoRAExperts
from minilora.lora.variants.residual import ResidualLoRA
from minilora.many import arithmetic
from minilora.many.parts import sorted_parts

__all__ = ["COMBINATIONS", "add_weighted_adapter"]

_SUMS: dict[str, Callable[..., Tensor]] = {
    "linear": arithmetic.task_arithmetic,
    "magnitude_prune": arithmetic.magnitude_prune,
    "ties": arithmetic.ties,
    "dare_linear": arithmetic.dare_linear,
    "dare_ties": arithmetic.dare_ties,
}
COMBINATIONS = (
    "cat",
    "svd",
    *_SUMS,
    *(f"{name}_svd" for name in _SUMS if name != "linear"),
)  # "cat" has a rule of its own


@dataclass(frozen=True)
class _How:
    """The arguments that say how tensors are summed and factors are found."""

    combination: str
    density: float | None
    majority: str
    clamp: float | None
    full_matrices: bool
    driver: str | None

    def sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The sum of tensors by the rule that ``combination`` names, of factors or (with "_svd") of updates."""
        name = self.combination.removesuffix("svd").rstrip("_") or "linear"
        more = () if name == "linear" else (self.density,)
        more = (*more, self.majority) if name in ("ties", "dare_ties") else more
        return _SUMS[name](
            tensors, torch.tensor(list(weights), dtype=tensors[0].dtype, device=tensors[0].device), *more
        )

    def factors(self, update: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """``(A, B)``: the best part of rank r (of each expert), all of its size in B; values beyond the quantile ``clamp`` are cut off."""
        U, S, Vh = torch.linalg.svd(update, full_matrices=self.full_matrices, driver=self.driver)
        kept = min(r, S.shape[-1])
        A, B = Vh[..., :kept, :], U[..., :kept] * S[..., None, :kept]
        if self.clamp is not None:
            highest = quantile(torch.cat([B.flatten(), A.flatten()]), self.clamp)
            A, B = A.clamp(-highest, highest), B.clamp(-highest, highest)
        return A, B


def quantile(values: Tensor, share: float) -> float:
    """The value that this share lies below, interpolated; ``torch.quantile`` takes 16 million values at most."""
    ordered, place = values.sort().values, share * (values.numel() - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
) -> None:
    """Make adapter ``adapter_name`` from others and keep it aside, frozen. Its scaling is 1, whatever theirs is.

    Args:
        adapters, weights: names and factors, which may be negative.
        combination_type: one of COMBINATIONS.
        svd_rank: rank for "svd" and the ``_svd`` forms; default the largest rank of the adapters.
        density: share of values that pruning keeps, in (0, 1].
        majority_sign_method: "total" or "frequency", for the forms with "ties".
        svd_clamp: for "svd" and the ``_svd`` forms, a share in [0, 1]: values of the factors beyond that quantile are cut off.
        svd_full_matrices, svd_driver: of ``torch.linalg.svd``; a driver is for CUDA only.

    Raises:
        ConfigError: an argument that cannot be meant. StateError: an unknown or taken name, ranks that differ where they must not, updates
            that are not low-rank (DoRA, lora_bias), or a module of which several of the adapters train a copy. Nothing has changed then.
    """
    record = adapters_of(model)
    how = _How(combination_type, density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver)
    _check(record, adapters, weights, how)
    parts = sorted_parts(record, adapters, weights)
    rank = _rank(parts.low, combination_type, svd_rank)
    config = dataclasses.replace(
        record.configs[adapters[0]],
        r=rank,
        lora_alpha=rank,
        **targets_of(Bare(model), tuple(parts.low)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,  # or the scaling would be sqrt(r) instead of 1
        init_lora_weights=True,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
        loftq_config={},
        modules_to_save=sorted(parts.copies) or None,
        trainable_token_indices=parts.token_indices() or None,
        bias=parts.bias(record, adapters),
        ensure_weight_tying=any(record.configs[name].ensure_weight_tying for name in adapters),
    )
    values = build(model, config, adapter_name, "lora")
    with torch.no_grad():
        for path, value in values.items():
            if path in parts.low:
                _fill(value, parts.low[path], how)
            else:
                parts.fill(path, value)
    place(model, config, adapter_name, values, "lora", activate=False)


def _check(record: Adapters, adapters: Sequence[str], weights: Sequence[float], how: _How) -> None:
    combination, density, majority = how.combination, how.density, how.majority
    record.check(adapters)
    if not isinstance(weights, Sequence):
        raise ConfigError(f"weights={weights!r}: wanted a list with one number for each adapter")
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
    validate.flag("svd_full_matrices", how.full_matrices)
    if how.clamp is not None and not (type(how.clamp) in (int, float) and 0 <= how.clamp <= 1):
        raise ConfigError(f"svd_clamp={how.clamp!r}: wanted a quantile in [0, 1], such as 0.99, or None")
    if how.driver is not None and how.driver not in ("gesvd", "gesvdj", "gesvda"):
        raise ConfigError(f"svd_driver={how.driver!r}: wanted None, 'gesvd', 'gesvdj' or 'gesvda'")
    for name in adapters if how.driver is not None else ():
        if any(p.device.type != "cuda" for value in record.named(name).values() for p in own_parameters(value)):
            raise ConfigError(
                f"svd_driver={how.driver!r} is for CUDA, and adapter {name!r} is not there; leave it None"
            )


def _rank(by_path: Mapping[str, Sequence[tuple[Adapter, float]]], combination: str, svd_rank: int | None) -> int:
    ranks = {path: [adapter.as_lora()[0].shape[-2] for adapter, _ in parts] for path, parts in by_path.items()}
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


def _fill(target: Value, parts: Sequence[tuple[Adapter, float]], how: _How) -> None:
    """Write the combination of ``parts`` into the factors of a new adapter whose scaling is 1."""
    own_A, own_B = _factors(target)
    weights = [weight for _, weight in parts]
    if how.combination == "cat":
        low = [_scaled_factors(adapter) for adapter, _ in parts]
        A = torch.cat([weight * a for (_, weight), (a, _) in zip(parts, low, strict=True)], -2)
        B = torch.cat([b for _, b in low], -1)
    elif how.combination.endswith("svd"):
        A, B = how.factors(how.sum([_dense(adapter) for adapter, _ in parts], weights), own_A.shape[-2])
    else:
        scaled = [weight * _scaling(adapter) for adapter, weight in parts]
        roots = [math.sqrt(abs(each)) for each in scaled]
        signed = [math.copysign(root, each) for root, each in zip(roots, scaled, strict=True)]
        A = how.sum([_factors(adapter)[0] for adapter, _ in parts], signed)
        B = how.sum([_factors(adapter)[1] for adapter, _ in parts], roots)
    own_A.zero_()[..., : A.shape[-2], :] = A
    own_B.zero_()[..., : B.shape[-1]] = B


def _factors(value: Value) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])`` as they are stored, of experts each; of an embedding ``(A [r, tokens], B [dimension, r])``."""
    if isinstance(value, LoRAEmbedding):
        return value.lora_embedding_A.data, value.lora_embedding_B.data
    if isinstance(value, LoRAExperts):
        return value.lora_A.data, value.lora_B.data
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
