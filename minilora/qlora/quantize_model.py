"""Put packed weights into a model: the walker again, with ``QuantLinear`` instead of adapters.

All packed layers are made before the first one is put into its place, so that a failure leaves the model as it was. That takes the memory
of the packed model beside the dense one: an eighth more for 4 bits beside fp32, a quarter beside bf16.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from minilora.errors import QuantizationError, StateError, TargetError
from minilora.linear.experts.hook import put_layer
from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import dense_weight, is_foreign, is_linear, is_quantized, pack
from minilora.lora.bare import Bare
from minilora.lora.bases import refuse_nested, refuse_to_replace
from minilora.lora.change import LOCK, Change
from minilora.lora.inject import slot_at
from minilora.lora.match import ALL_LINEAR, linear_paths, refuse_unfit
from minilora.lora.slots import has_adapters, unwrapped
from minilora.lora.targets import Selection, select
from minilora.quant.blockwise import check_quantizable
from minilora.quant.config import QuantConfig, quant_config

__all__ = ["quantizable_paths", "quantize_model"]


def quantize_model(
    model: nn.Module,
    config: QuantConfig | None = None,
    target_modules: Selection = ALL_LINEAR,
    importance: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace linear layers by ``QuantLinear`` and experts' projections by ``QuantExperts``, in place. If it fails, none is replaced.

    Args:
        model: any module; changed in place, frozen layers replaced, and returned.
        config: format, blocksize, double quantization; default NF4, 64, single.
        target_modules: list of names, one regex, or "all-linear" (all but the output head; of routers those that call a linear layer).
        importance: what ``calibrate`` returned, for ``scale="weighted"``.

    Raises:
        TargetError: an entry matches nothing, or a match is no dense linear layer. StateError: the model carries adapters already.
        QuantizationError: a weight holds NaN or infinity; every layer is checked before the first is replaced.
    """
    if has_adapters(model):
        raise StateError("the model carries adapters; quantize it first and inject then")
    config = quant_config(config)
    paths = quantizable_paths(model, target_modules)
    modules = dict(Bare(model).named_modules(remove_duplicate=False))
    for path in paths:  # all of them before the first is replaced
        check_quantizable(dense_weight(modules[path]), path + ".weight")
        if config.scale == "weighted" and is_experts(modules[path]):
            raise QuantizationError(
                f"{path}: scale='weighted' wants the importance of each input, not measured for experts; use 'absmax' or 'mse', or name "
                "the layers to pack (target_modules)"
            )
        if config.scale == "weighted" and path not in (importance or {}):
            raise QuantizationError(
                f"{path}: scale='weighted' wants its importance; pass importance=minilora.calibrate(model, batches)"
            )
    slots = [slot_at(modules, path) for path in paths]
    packed = [
        pack(modules[slot.path], config, slot.path + ".weight", (importance or {}).get(slot.path)).train(model.training)
        for slot in slots
    ]
    with LOCK, Change() as change:
        for slot, layer in zip(slots, packed, strict=True):
            put_layer(change, slot.parent, slot.attr, layer)
    return model


def quantizable_paths(model: nn.Module, target_modules: Selection) -> list[str]:
    """Paths of the layers to quantize; one that is packed already is passed over by "all-linear" and refused by name."""
    model = unwrapped(model)
    refuse_nested(model.named_modules())
    modules = {path: module for path, module in Bare(model).named_modules() if path}
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        every = linear_paths(model, routers=True)
        paths = [path for path in every if not (is_quantized(modules[path]) or is_foreign(modules[path]))]
    else:
        paths = select(modules, target_modules, "target_modules")
    refuse_unfit(Bare(model), modules, paths)
    if others := [path for path in paths if not (is_linear(modules[path]) or is_experts(modules[path]))]:
        kind = type(modules[others[0]]).__name__
        raise TargetError(
            f"{others[0]}: {kind} has no packed form; quantize linear layers and experts' projections only"
        )
    for path in paths:
        refuse_to_replace(path, modules[path])
    if packed := [path for path in paths if is_quantized(modules[path]) or is_foreign(modules[path])]:
        raise TargetError(f"{packed[0]} is quantized already; leave it out of target_modules")
    if not paths:
        raise TargetError("no dense linear layer is left to quantize; wanted a model that is not packed already")
    return paths
