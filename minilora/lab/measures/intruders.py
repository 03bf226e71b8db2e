"""Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228): directions of an adapted weight that the base has none like.

They are measured here; ``many/intruders.py`` has the formula, and makes them smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.files import validate
from minilora.lab.measures.subject import fixed_updates
from minilora.linear.layers import dense_weight
from minilora.many.intruders import closest_directions

__all__ = ["Intruders", "intruder_dimensions"]


@dataclass(frozen=True)
class Intruders:
    """What was found in one layer.

    Attributes:
        count: how many of the first directions are intruders.
        cosines: fp32 ``[min(k, in, out)]``, of each direction the largest absolute cosine to the base's, largest singular value first.
    """

    count: int
    cosines: Tensor


@torch.no_grad()
def intruder_dimensions(
    model: nn.Module, k: int = 10, epsilon: float = 0.5, adapter_name: str = "default"
) -> dict[str, Intruders]:
    """By path of each adapted layer, those of the first k left singular vectors of ``W + dW`` that are unlike all of ``W``.

    One is an intruder if its largest absolute cosine to a left singular vector of the base weight W is below ``epsilon``. A layer takes two
    dense SVDs in fp32, whatever the update; a packed base is unpacked one layer at a time.

    Raises:
        ConfigError: a number that cannot be meant. StateError: no such adapter, or an update that is another one for each input.
    """
    validate.whole("k", k, 1)
    validate.number("epsilon", epsilon, 0, 2)
    found = {}
    for path, adapter in fixed_updates(model, adapter_name).items():
        weight, delta = dense_weight(adapter.innermost).float(), adapter.delta_weight()
        pairs = {path: (weight, delta)}
        if weight.dim() == 3:  # experts
            pairs = {f"{path}[{at}]": own for at, own in enumerate(zip(weight, delta, strict=True))}
        for name, own in pairs.items():
            *_, cosines = closest_directions(*own, k)
            found[name] = Intruders(int((cosines < epsilon).sum()), cosines.cpu())
    return found
