"""The curves of a probe: each is a factor a layer, by which the adapter's part of that layer's output counts.

With ``f = 0`` everywhere the low-rank part is left out, with 1 it is as trained, with 0.5 it is halved; a program that computes a layer's
scale by another rule has another factor in that layer. What a layer adds is the difference between the adapted layer and the layer that
was there before, so it is the same rule for every variant: an export that turns PiSSA into a plain LoRA adds just that.
Next file: ``proof/measured.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.lora.change import Change
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import Slot
from minilora.lora.slots import adapters_of
from minilora.lora.variants.dora import DoRALinear
from minilora.lora.variants.residual import ResidualLoRA
from minilora.many.adapted import disabled
from minilora.proof.probe import ADAPTED, BASE, Curve
from minilora.store.contents import by_factors

__all__ = ["Way", "applied", "ways"]

LISTED, FEW = 20, 8  # tokens that a probe lists of base and adapted model, and of the other curves
SCALES = (0.25, 0.5, 0.75, 1.5, 2.0)  # beside 0 and 1: what is between is interpolated
_MOST_KINDS = 9  # kinds of layers that are left out one by one

OVER_RANK = "lora_alpha / r in every layer, as llama.cpp's converter reads a folder that was not exported"
NO_PATTERNS = "rank_pattern and alpha_pattern passed over, as vLLM reads a folder that was not exported"
RAW = "the trained factors beside the untouched base, without what they started from, as of a folder that was not exported"

NO_MAGNITUDES = "DoRA's magnitudes left out, so that its factors are those of a plain LoRA"
BASE_MAGNITUDES = "DoRA's magnitudes as the base has them, as transformers' load_adapter leaves them"


@dataclass(frozen=True)
class Way:
    """A curve, and what it does: ``factors`` by path, 1 for what is not named; None is the base. ``raw``: the file's factors, beside the
    untouched base. ``untrained``: DoRA's magnitudes are the base's.
    """

    curve: Curve
    factors: Mapping[str, float] | None
    raw: bool = False
    untrained: bool = False


def ways(model: nn.Module) -> list[Way]:
    """Every curve that makes sense for the active adapter of a model; the first is the base, the second the adapted model.

    Raises:
        StateError: not exactly one adapter is active, or one is merged.
    """
    adapters = adapters_of(model)
    if len(adapters.active) != 1 or adapters.merged:
        raise StateError("a probe is made of one active adapter that is not merged; activate it alone")
    (name,) = adapters.active
    found = [Way(Curve(BASE, "scale", 0.0, LISTED), None), Way(Curve(ADAPTED, "scale", 1.0, LISTED), {})]
    layers = {path: value for path, value in adapters.named(name).items() if isinstance(value, Adapter)}
    if any(value.on not in ("linear", "embedding", "convolution") for value in layers.values()):
        return found  # experts are computed together, and no layer of its own adds what one of them does
    for scale in SCALES:
        found.append(Way(Curve(f"scale {scale:g}", "scale", scale, FEW), dict.fromkeys(layers, scale)))
    config: Any = adapters.configs[name]
    misread = [(OVER_RANK, _over_rank(config, layers)), (NO_PATTERNS, _no_patterns(config, layers)), *_left_out(layers)]
    seen = [way.factors for way in found[1:]]
    for about, factors in misread:
        if factors not in seen and any(factor != 1 for factor in factors.values()):
            seen.append(factors)
            found.append(Way(Curve(about, "misread", 1.0, FEW), factors))
    if any(isinstance(value, ResidualLoRA) for value in layers.values()):
        found.append(Way(Curve(RAW, "misread", 1.0, FEW), {}, raw=True))
    if any(_has_magnitudes(value) for value in layers.values()):
        found.append(Way(Curve(NO_MAGNITUDES, "misread", 1.0, FEW), {}, raw=True))
        found.append(Way(Curve(BASE_MAGNITUDES, "misread", 1.0, FEW), {}, untrained=True))
    return found


def _has_magnitudes(value: object) -> TypeGuard[DoRALinear]:
    return isinstance(value, DoRALinear) and value.on == "linear"


def _over_rank(config: LoraConfig, layers: Mapping[str, Adapter]) -> dict[str, float]:
    return {path: config.lora_alpha / value.r / value.scaling for path, value in layers.items() if _scaled(value)}


def _no_patterns(config: LoraConfig, layers: Mapping[str, Adapter]) -> dict[str, float]:
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return {path: scale / value.scaling for path, value in layers.items() if _scaled(value)}


def _scaled(value: Any) -> bool:
    """Whether a file says no more of the layer's scale than ``r`` and ``lora_alpha``."""
    return by_factors(type(value)) and isinstance(value.scaling, (int, float)) and bool(value.scaling)


def _left_out(layers: Mapping[str, Adapter]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each kind of layer left out, and each part that holds several kinds, such as mlp."""
    for depth in (-1, -2):
        parts = [path.split(".")[depth] if path.count(".") >= -depth - 1 else "" for path in layers]
        kinds = list(dict.fromkeys(part for part in parts if part and not part.isdigit()))
        if len(kinds) > _MOST_KINDS:
            continue
        for kind in kinds:
            factors = {path: 0.0 for path, part in zip(layers, parts, strict=True) if part == kind}
            if len(factors) < len(layers):
                yield f"{kind} left out", factors


@contextmanager
def applied(model: nn.Module, way: Way) -> Iterator[None]:
    """Inside the block the model computes as ``way`` says; nothing of it stays."""
    if way.factors is None:
        with disabled(model):
            yield
        return
    adapters = adapters_of(model)
    change = Change()
    with ExitStack() as stack:
        stack.callback(change.take_back)
        for path, slot in adapters.slots.items():
            factor, value = way.factors.get(path, 1.0), slot.kept.get(adapters.active[0])
            raw = value if way.raw and (isinstance(value, ResidualLoRA) or _has_magnitudes(value)) else None
            if way.untrained and _has_magnitudes(value):
                own = value.lora_magnitude_vector.data
                stack.callback(setattr, value.lora_magnitude_vector, "data", own)
                value.lora_magnitude_vector.data = value.base_norm_squared.sqrt().to(own)
            if not isinstance(value, Adapter) or (factor == 1 and raw is None):
                continue
            if raw is None and _scaled(value):  # the same at half the cost: one number
                change.put(value, "scaling", value.scaling * factor)
                continue
            front: Any = slot.parent._modules.get(slot.attr)  # what the model calls
            stack.callback(front.register_forward_hook(_hook(slot, factor, raw), with_kwargs=True).remove)
        yield


def _hook(slot: Slot, factor: float, raw: LoRALinear | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        before: Any = slot.base
        base: Tensor = before(*args, **kwargs)
        if raw is not None:
            return base + LoRALinear.update(raw, args[0])
        return base + factor * (output - base) if factor else base

    return hook
