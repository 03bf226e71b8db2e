"""How much of a model an adapter covers: of all weights that are multiplied with, those it changes. Next file: ``lora/slots.py``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from minilora.linear.convolution import is_convolution
from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import is_linear, weight_name
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.slots import adapters_of

__all__ = ["called", "coverage", "experts_left", "linear_weights"]

_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)


def coverage(model: nn.Module) -> tuple[list[str], list[str]]:
    """``(covered, others)``: paths of the weights that the active adapters change or train whole, and of those that they do not.

    Counted are linear layers, convolutions, both projections of ``nn.MultiheadAttention``, and matrices that are bare parameters. A
    projection of all experts counts as one weight, however many experts there are. Tables whose rows are looked up are not counted.
    """
    adapters = adapters_of(model)
    shown = {path: value for name in adapters.active for path, value in adapters.named(name).items()}
    around = {
        _read_weight(path, value) if value.on in ("attention", "router") else path
        for path, value in shown.items()
        if isinstance(value, Adapter)
    }
    whole = [path for path, value in shown.items() if isinstance(value, nn.Module) and not isinstance(value, Adapter)]
    covered: list[str] = []
    others: list[str] = []
    for path in linear_weights(Bare(model)):
        trained = path in around or any(path == copy or path.startswith(copy + ".") for copy in whole)
        (covered if trained else others).append(path)
    return covered, others


def experts_left(model: nn.Module) -> list[str]:
    """Paths of the projections of experts, where the model has any and the active adapters change none of them."""
    bare = Bare(model)
    every = [path for path, module in bare.named_modules() if is_experts(module)]
    return [] if set(every) & set(coverage(model)[0]) else every


def linear_weights(bare: Bare) -> Iterator[str]:
    """Paths of all linear layers, convolutions and projections of experts, and of matrices that are bare parameters."""
    for path, module in bare.named_modules():
        if is_linear(module) or isinstance(module, nn.Linear) or is_convolution(module) or is_experts(module):
            yield path
        elif not isinstance(module, _OTHERS):
            for name, parameter in bare.parameters_of(module):
                if parameter.dim() in (2, 3) and min(parameter.shape) > 1 and not name.endswith("bias"):
                    yield f"{path}.{name}" if path else name


def called(path: str) -> str:
    """A weight's short name: the last part of its path, the last two where that is "weight"."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1] == "weight" else parts[-1:])


def _read_weight(path: str, value: Adapter) -> str:
    """What ``linear_weights`` calls the weight of a layer that reads it: a router that is a Linear by class counts as one."""
    inner = value.innermost
    return path if isinstance(inner, nn.Linear) else f"{path}.{weight_name(inner)}"
