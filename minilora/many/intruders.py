"""Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228, section 5): directions of an adapted weight that the base has none like.

A left singular vector of ``W + s B A`` among the first few that no left singular vector of W is close to is an intruder; what was known
before suffers from it. Its part of the weight is made smaller, and what is then left of the update is factorized again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, KindError, StateError
from minilora.files import validate
from minilora.linear.layers import dense_weight
from minilora.lora.inject import build, place
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.lora.variants.experts import LoRAExperts

__all__ = ["closest_directions", "reduce_intruder_dimension"]


@torch.no_grad()
def reduce_intruder_dimension(
    model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Make a new adapter from a plain LoRA, with its intruder dimensions made smaller, and make it the active one. The old one stays.

    Args:
        top_k: how many of the largest singular directions are looked at.
        threshold_epsilon: the cosine to all directions of the base below which one is an intruder.
        mitigation_lambda: the share of an intruder's part that is left; 1 changes nothing.
        logging_sink: gets a line a layer; None for none.

    Raises:
        ConfigError: a number that cannot be meant. StateError: an unknown or taken name, or an adapter that trains more than low-rank
            updates. KindError: a variant other than plain LoRA. Nothing has changed then.
    """
    validate.whole("top_k", top_k, 1)
    for name, number in (("threshold_epsilon", threshold_epsilon), ("mitigation_lambda", mitigation_lambda)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number >= 0:
            raise ConfigError(f"{name}={number!r}: wanted a number >= 0")
    say: Callable[[str], Any] = logging_sink or (lambda _: None)
    record = adapters_of(model)
    old = record.named(old_adapter_name)
    if (kind := record.variants[old_adapter_name]) != "lora":
        raise KindError(
            f"The provided model is not using LoRA and is therefore not supported: adapter {old_adapter_name!r} is {kind}"
        )
    for path, value in old.items():
        if not isinstance(value, (LoRALinear, LoRAEmbedding)) or getattr(value, "lora_bias", None) is not None:
            raise StateError(
                f"adapter {old_adapter_name!r} trains more than a low-rank update at {path}; merge it instead"
            )
    config = dataclasses.replace(record.configs[old_adapter_name], init_lora_weights=True, eva_config=None)
    values = build(model, config, new_adapter_name, "lora")
    for path, value in values.items():
        _fill(value, old[path], path, (top_k, threshold_epsilon, mitigation_lambda), say)
        for parameter, model_of in zip(own_parameters(value), own_parameters(old[path]), strict=True):
            parameter.data = parameter.data.to(model_of.dtype)
    say(f"Enabling new adapter {new_adapter_name}")
    place(model, config, new_adapter_name, values, "lora")


def _fill(new: Any, old: Any, path: str, how: tuple[int, float, float], say: Callable[[str], Any]) -> None:
    """Write the factors of ``old``, without its intruders, into ``new``, which has its rank and scaling."""
    weight, update = dense_weight(old.innermost).float(), old.delta_weight()
    if isinstance(old, LoRAExperts):  # each is a layer of its own
        for expert in range(old.experts):
            found = _reduced(weight[expert], update[expert], old, f"{path}, expert {expert}", how, say)
            new.lora_A[expert], new.lora_B[expert] = found or (old.lora_A[expert], old.lora_B[expert])
        return
    found = _reduced(weight, update, old, path, how, say)
    if found is None:
        for name in old.file_names:
            if (factor := getattr(old, name)) is not None:
                getattr(new, name).copy_(factor)
        return
    (A, B), names = found, ("lora_A", "lora_B")
    if isinstance(new, LoRAEmbedding):
        (A, B), names = (B.T, A.T), ("lora_embedding_A", "lora_embedding_B")
    getattr(new, names[0]).copy_(A)
    getattr(new, names[1]).copy_(B)


def _reduced(
    weight: Tensor, update: Tensor, old: Any, path: str, how: tuple[int, float, float], say: Callable[[str], Any]
) -> tuple[Tensor, Tensor] | None:
    """``(A [r, in], B [out, r])`` of the update of one matrix with its intruders made smaller; None where it has none."""
    smaller = _without_intruders(weight, update, *how)
    if smaller is None:
        say(f"{path}: No intruders")
        return None
    left, count = smaller
    say(f"{path}: Intruders: {count}")
    U, S, Vh = torch.linalg.svd(left / old.scaling, full_matrices=False)
    kept = min(old.r, len(S))
    root = S[:kept].sqrt()
    A, B = weight.new_zeros(old.r, weight.shape[1]), weight.new_zeros(len(weight), old.r)
    A[:kept], B[:, :kept] = root[:, None] * Vh[:kept], U[:, :kept] * root
    return A, B


def closest_directions(weight: Tensor, update: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The SVD ``(U, S, Vh)`` of ``weight + update``, and how close its first directions come to any of the weight's own.

    Args:
        weight, update: ``[out, in]``, fp32 or wider.

    Returns:
        The last is ``[min(top_k, in, out)]``: of each left singular vector, largest singular value first, the largest absolute cosine to
        the left singular vectors of ``weight``. Below a threshold it is an intruder.
    """
    base = torch.linalg.svd(weight, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(weight + update, full_matrices=False)
    return U, S, Vh, (U[:, :top_k].T @ base).abs().amax(1)


def _without_intruders(
    weight: Tensor, update: Tensor, top_k: int, threshold: float, share: float
) -> tuple[Tensor, int] | None:
    """The update with its intruders' part made smaller, and how many there are; None where there are none."""
    U, S, Vh, closest = closest_directions(weight, update, top_k)
    found = (closest < threshold).nonzero().flatten()
    if not len(found):
        return None
    part = (U[:, found] * S[found]) @ Vh[found]
    return update + (share - 1) * part, len(found)
