"""LoRA and DoRA on a convolution: A is a convolution with the layer's kernel and r channels, B mixes those in every position.

    y = W * x + s B (A * x),     A [r, in_channels, *kernel],  B [out, r / groups, 1, ...]     (the layout of PEFT)

Over patches this is LoRA as on a linear layer, so the law, merging and DoRA's norms are the linear ones. A goes with the layer's stride,
padding and dilation. Where the layer has groups, B has them and A has not (as in PEFT): each group gets its own r / groups channels of
A, which see all inputs. So the update joins the groups, and merging it makes a convolution without groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.linear.convolution import block_diagonal, convolve, of_channels
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.variants.dora import DoRALinear

_POINTWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight


@register(
    "lora_ga", on="convolution"
)  # which has no gradient's directions for a kernel: it starts as plain LoRA, as in PEFT
@register("lora", on="convolution")
class LoRAConv(LoRALinear):
    """A convolution (1d, 2d or 3d) with a low-rank update.

    Attributes:
        lora_A: ``[r, in_channels, *kernel]`` fp32, trained. lora_B: ``[out, r / groups, 1, ...]`` fp32, trained.
        lora_bias: ``[out]`` fp32, trained, or None.

    Raises:
        ConfigError: the rank is no multiple of the layer's groups.
    """

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        r, layer = config.for_module(path)[0], cast(Any, base_layer)
        if r % layer.groups:
            wanted = -(-r // layer.groups) * layer.groups
            raise ConfigError(
                f"{path}: r={r} on a convolution of {layer.groups} groups; wanted a multiple of them: rank_pattern={{{path!r}: {wanted}}}"
            )
        super().__init__(base_layer, config, path)
        self.lora_A = nn.Parameter(self.lora_A.data.view(self.r, layer.in_channels, *layer.kernel_size))
        self.lora_B = nn.Parameter(self.lora_B.data.view(self.out_features, self.thin, *[1] * len(layer.kernel_size)))

    @property
    def thin(self) -> int:
        layer: Any = self.innermost
        return self.r // layer.groups

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        plain = config.init_lora_weights in (True, False, "gaussian")
        return super().initial_factors(
            config if plain else replace(config, init_lora_weights=True, lora_ga_config=None)
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        B = self.lora_B.float().flatten(1)
        return self.lora_A.float().flatten(1), block_diagonal(B, self.r // B.shape[1])

    def update(self, x: Tensor) -> Tensor:
        """``scaling * B (A * x)`` in the dtype that flows through the layer."""
        layer: Any = self.innermost
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype)
        thin = convolve(layer, x, self.lora_A.to(x.dtype))
        return _POINTWISE[self.lora_B.dim()](thin, self.lora_B.to(x.dtype), bias, groups=layer.groups) * self.scaling

    def __getattr__(self, name: str) -> Any:
        """What a model asks a convolution for (its stride, its kernel's size) is what the layer answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


@register("dora", on="convolution")
class DoRAConv(LoRAConv, DoRALinear):
    """A convolution whose update is scaled channel by channel.

    Attributes:
        lora_magnitude_vector: ``[1, out, 1, ...]`` fp32, trained: the wanted norm of each output channel's kernel.
    """

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        self.lora_magnitude_vector = nn.Parameter(self.lora_magnitude_vector.data.unsqueeze(0))

    def over_outputs(self, values: Tensor) -> Tensor:
        return of_channels(self.innermost, values)  # type: ignore[arg-type]
