"""What a model's adapters are, layer by layer and as a whole: PEFT's ``get_layer_status`` and ``get_model_status``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.errors import StateError
from minilora.linear.layers import is_foreign, is_quantized, kind_of
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.slot import Slot, own_parameters
from minilora.lora.slots import Adapters, adapters_of, has_adapters, unwrapped
from minilora.many.adapted import count_parameters
from minilora.peft.experts import shown_path
from minilora.peft.face import Face
from minilora.peft.wrappers import is_rows

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Mixed = Any  # True, False or "irregular"
_TRAINED_WHOLE = ("ModulesToSaveWrapper", "TrainableTokensLayer")
_BACKENDS = {"Linear4bit": "bnb 4bit", "Linear8bitLt": "bnb 8bit"}


@dataclass
class TunerLayerStatus:
    """One adapted layer. ``requires_grad``: adapter name to True, False or "irregular"; ``devices``: to the devices of its parameters."""

    name: str
    module_type: str
    enabled: Mixed
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A whole model; "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Mixed
    active_adapters: Any
    merged_adapters: Any
    requires_grad: dict[str, Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: Any


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer and trained copy. Raises ``StateError`` for a model without adapters."""
    if not has_adapters(model):
        raise StateError("No adapter layers found in the model: it has no adapters; get_peft_model or inject first")
    adapters = adapters_of(model)
    order = {path: at for at, (path, _) in enumerate(Bare(model).named_modules())}
    slots = [slot for slot in adapters.slots.values() if isinstance(slot.base, nn.Module)]
    slots.sort(key=lambda slot: _place(shown_path(adapters, slot.path), order))
    prefix = "model." if isinstance(unwrapped(model), Face) else ""
    return [_of_layer(slot, adapters, prefix) for slot in slots]


def _place(path: str, order: dict[str, int]) -> tuple[int, int]:
    """Where a path stands in PEFT's tree: what is inside of another adapter of experts comes after that."""
    return order.get(path.replace(".base_layer", ""), len(order)), path.count(".base_layer")


def _of_layer(slot: Slot, adapters: Adapters, prefix: str) -> TunerLayerStatus:
    trained = {name: list(own_parameters(value)) for name, value in slot.kept.items()}
    return TunerLayerStatus(
        name=prefix
        + shown_path(adapters, slot.path)
        + (".token_adapter" if any(map(is_rows, slot.kept.values())) else ""),
        module_type=_type_of(slot),
        enabled=not (adapters.is_bare or slot.off),
        active_adapters=_active_here(slot, adapters),
        merged_adapters=[name for name in adapters.merged if name in slot.kept],
        requires_grad={name: _same(p.requires_grad for p in values) for name, values in trained.items() if values},
        available_adapters=sorted(slot.kept),
        devices={name: sorted({p.device.type for p in values}) for name, values in trained.items() if values},
        quantization_backend=_packed_by(slot.base),
    )


def _active_here(slot: Slot, adapters: Adapters) -> list[str]:
    """The active adapters of a layer; of a trained copy only those that have one, as in PEFT."""
    names = adapters.chosen if slot.only is None else slot.only
    return list(names) if _type_of(slot) not in _TRAINED_WHOLE else [name for name in names if name in slot.kept]


def _packed_by(base: Any) -> str | None:
    if is_foreign(base):
        return _BACKENDS.get(type(base).__name__, type(base).__name__)
    return "minilora" if is_quantized(base) else None


def _type_of(slot: Slot) -> str:
    if not any(isinstance(value, Adapter) for value in slot.kept.values()):
        return "ModulesToSaveWrapper"
    if any(map(is_rows, slot.kept.values())):
        return "TrainableTokensLayer"
    base: Any = slot.base
    if kind_of(base) in {"experts", "router"}:
        return "lora.ParamWrapper"
    kinds = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    name = next((kind.__name__ for kind in kinds if isinstance(slot.base, kind)), "Linear")
    return f"lora.{name}"


def _of_whole(layers: list[TunerLayerStatus]) -> list[list[str]]:
    """What each layer says of the active adapters; a copy only where it does not agree with them."""
    lora = [layer.active_adapters for layer in layers if layer.module_type not in _TRAINED_WHOLE]
    names = lora[0] if lora else []
    copies = [layer for layer in layers if layer.module_type in _TRAINED_WHOLE]
    odd = [
        each.active_adapters
        for each in copies
        if each.active_adapters != [name for name in names if name in each.available_adapters]
    ]
    return lora + odd


def _same(values: Iterable[Any]) -> Any:
    """The one value that all have, else "irregular"."""
    found = list(values)
    return found[0] if all(value == found[0] for value in found) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a model as a whole. Raises ``StateError`` for a model without adapters."""
    layers, adapters = get_layer_status(model), adapters_of(model)
    trainable, every = count_parameters(model)

    def together(of: Callable[[TunerLayerStatus], dict[str, Any]], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
        return {
            name: join(found)
            for name in adapters.configs
            if (found := [of(layer)[name] for layer in layers if name in of(layer)])
        }

    is_face = isinstance(unwrapped(model), Face)
    return TunerModelStatus(
        base_model_type=type(unwrapped(model)).__name__,
        adapter_model_type="LoraModel" if is_face else "None",
        peft_types=dict.fromkeys(adapters.configs, "LORA") if is_face else {},
        trainable_params=trainable,
        total_params=every,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_same(whole) if (whole := _of_whole(layers)) else list(adapters.chosen),
        merged_adapters=list(adapters.merged),
        requires_grad=together(lambda layer: layer.requires_grad, _same),
        available_adapters=sorted(adapters.configs),
        devices=together(
            lambda layer: layer.devices, lambda found: sorted({kind for kinds in found for kind in kinds})
        ),
        quantization_backend=_same(layer.quantization_backend for layer in layers),
    )
