"""How much of an adapter counts: its scaling changed for a while, or for good. Nothing of it is saved: a file's scaling is its config's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora.errors import ConfigError, KindError, StateError
from minilora.lora.adapter import Adapter
from minilora.lora.change import LOCK, Change
from minilora.lora.slots import adapters_of, has_adapters

__all__ = ["rescale_adapter_scale", "scale_layer", "set_scale", "unscale_layer"]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the block the updates of all adapters are ``multiplier`` times as large; 0 is the base model (WiSE-FT, arXiv 2109.01903).

    Raises:
        KindError: a multiplier that is no number. ConfigError: one that is not finite. StateError: no adapter has a scaling.
    """
    _check(multiplier, "multiplier")
    scaled = [value for value in _values(model) if _has_scaling(value)]
    if not scaled:
        raise StateError("scaling is only supported for models with `LoraLayer`s; inject an adapter first")
    change = Change()
    try:
        try:  # twice, so that an interrupt on the way out cannot leave a scaling
            with LOCK:
                for value in scaled:
                    change.put(value, "scaling", value.scaling * multiplier)
            yield
        finally:
            change.take_back()
    finally:
        change.take_back()


def _values(model: nn.Module) -> list[Any]:
    slots = adapters_of(model).slots.values() if has_adapters(model) else ()
    return [value for slot in slots for value in slot.kept.values()]


def _has_scaling(value: object) -> bool:
    return isinstance(value, Adapter) and isinstance(vars(value).get("scaling"), (int, float))


def _check(factor: object, name: str) -> None:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise KindError(f"Argument {name} should be of type float, got {type(factor)}; {name}={factor!r}")
    if not math.isfinite(factor):
        raise ConfigError(f"{name}={factor!r}: wanted a finite number")


def _initial(layer: Any) -> float:
    """The scaling that the layer was made with, noted when it is changed for the first time."""
    if not _has_scaling(layer):
        raise KindError(f"a {type(layer).__name__} has no scaling; wanted an adapter such as LoRALinear")
    return vars(layer).setdefault("initial_scaling", layer.scaling)


def set_scale(layer: Adapter, scale: float) -> None:
    """Set an adapter's scaling in one layer to ``scale`` times the one that its config gives it."""
    _check(scale, "scale")
    layer.scaling = _initial(layer) * scale  # type: ignore[assignment]


def scale_layer(layer: Adapter, scale: float) -> None:
    """Multiply an adapter's scaling in one layer."""
    _check(scale, "scale")
    _initial(layer)
    layer.scaling = layer.scaling * scale


def unscale_layer(layer: Adapter, scale: float | None = None) -> None:
    """Divide an adapter's scaling in one layer; without ``scale`` back to the one that its config gives it.

    Raises:
        ConfigError: a scale of 0, by which nothing can be divided.
    """
    if scale is None:
        layer.scaling = _initial(layer)  # type: ignore[assignment]
        return
    _check(scale, "scale")
    if scale == 0:
        raise ConfigError(
            "scale=0: nothing can be divided by it; unscale_layer(layer) goes back to the config's scaling"
        )
    scale_layer(layer, 1 / scale)
