"""How much of a model an adapter covers: of all weights that are multiplied with, those it changes. Next file: ``lora/slots.py``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from minilora.linear.convolution import is_convolution
from minilora.linear.layers import is_linear
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.slots import adapters_of

__all__ = ["coverage"]

_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)


def coverage(model: nn.Module) -> tuple[list[str], list[str]]:
    """``(covered, others)``: paths of the weights that the active adapters change or train whole, and of those that they do not.

    Counted are linear layers, convolutions and both projections of ``nn.MultiheadAttention``. A matrix that is a bare parameter (fused
    experts) counts as one weight: no adapter can stand there. Tables whose rows are looked up are not counted.
    """
    adapters = adapters_of(model)
    shown = {path: value for name in adapters.active for path, value in adapters.named(name).items()}
    around = {
        f"{path}.in_proj_weight" if value.on == "attention" else path
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


def linear_weights(bare: Bare) -> Iterator[str]:
    """Paths of all linear layers and convolutions, and of matrices that are bare parameters."""
    for path, module in bare.named_modules():
        if is_linear(module) or isinstance(module, nn.Linear) or is_convolution(module):
            yield path
        elif not isinstance(module, _OTHERS):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() in (2, 3) and min(parameter.shape) > 1:
                    yield f"{path}.{name}" if path else name
