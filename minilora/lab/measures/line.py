"""The loss on the line from the base weights through the adapted ones: ``W + t dW`` (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, StateError
from minilora.files import validate
from minilora.lab.measures.subject import measured
from minilora.lora.adapter import Adapter
from minilora.lora.slots import adapters_of
from minilora.lora.variants.embedding import Tied
from minilora.many.scaling import rescale_adapter_scale
from minilora.training.guards import check_examples
from minilora.training.losses import evaluate

__all__ = ["landscape"]

STEPS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def landscape(
    model: nn.Module,
    examples: Sequence[Encoded],
    steps: Sequence[float] = STEPS,
    adapter_name: str = "default",
    *,
    batch_size: int = 8,
) -> list[tuple[float, float]]:
    """``(t, loss)`` for each t in ``steps``, the loss in nats per supervised token: 0 is the base model, 1 the adapted one.

    The adapter's scaling is multiplied by t, which multiplies its update where that is a product of factors; the scaling is put back, the
    very same number, also after Ctrl-C.

    Raises:
        ConfigError: steps that are no finite numbers. DataError: examples that cannot be used.
        StateError: as ``subject.measured``; or a part of the adapter whose update does not grow with its scaling: DoRA and trained rows
            of tokens, VeRA, which has none, trained biases and copies of modules. Nothing has changed then.
    """
    validate.whole("batch_size", batch_size, 1)
    if not steps:
        raise ConfigError("steps is empty; wanted the places on the line, such as [0, 0.5, 1]")
    for t in steps:
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not math.isfinite(t):
            raise ConfigError(f"steps={validate.shown(list(steps))}: wanted finite numbers, such as [0, 0.5, 1]")
    for path, value in adapters_of(model).named(adapter_name).items():
        if why := _why_not_scaled(value):
            raise StateError(f"{path}: {why}; give an adapter of plain updates (LoRA, PiSSA and the like)")
    check_examples(model, examples, 0, "landscape")
    found = []
    with measured(model, adapter_name):
        for t in steps:
            with rescale_adapter_scale(model, t):
                found.append((float(t), evaluate(model, examples, batch_size, 0)))
    return found


def _why_not_scaled(value: object) -> str:
    """Why a multiple of the scaling is not the same multiple of the update; "" where it is."""
    if not isinstance(value, Adapter):
        return "it is trained as a whole, so there is no update to scale"
    adapter = value.source if isinstance(value, Tied) else value  # a tied layer has the update of its twin
    if adapter.reads_base:
        return f"the update of a {type(value).__name__} does not grow with its scaling"
    if not isinstance(vars(adapter).get("scaling"), (int, float)):
        return f"a {type(value).__name__} has no scaling"
    return ""
