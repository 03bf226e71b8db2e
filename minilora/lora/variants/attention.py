"""LoRA on ``nn.MultiheadAttention``: one update of its input projection, one of its output projection.

Torch's attention calls neither: it reads both weights (and its fast path, and that of ``nn.TransformerEncoderLayer`` around it, read
them from outside). So the weights are what the adapters change: each call computes ``W + s B A`` and hands it to torch's own function.
The input projection is the bare parameter ``in_proj_weight [3 dimension, dimension]`` of queries, keys and values. Two adapters share the
work: ``LoRAAttention`` stands around the whole layer, ``LoRAOutProj`` around its ``out_proj``. Keys in a file are PEFT's.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.variants.read import ReadLoRA, refuse_fields


@register("lora", on="attention")
class LoRAAttention(ReadLoRA):
    """An attention with an update of its input projection.

    Attributes:
        lora_A: ``[r, dimension]`` fp32, trained. lora_B: ``[3 * dimension, r]`` fp32, trained.

    Raises:
        ConfigError: ``lora_dropout``, which cannot reach a weight that is read; ``lora_bias`` or trained biases, which PEFT has not here.
    """

    reads: ClassVar[str] = "in_proj_weight"

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        _refuse_fields(config, path)
        super().__init__(base_layer, config, path)

    @property
    def in_proj_weight(self) -> Tensor:
        """What a model sees that reads it: the layer's with every update."""
        return self.weight


class LoRAOutProj(LoRALinear):
    """The output projection of an attention, whose weight is read. It belongs to the adapter of the attention, which is what is named."""

    targeted: ClassVar[bool] = False

    @staticmethod
    def file_path(path: str) -> str:
        """PEFT's, which has the layer inside of its attention's adapter."""
        owner, _, name = path.rpartition(".")
        return f"{owner}.base_layer.{name}" if owner else f"base_layer.{name}"


def attention_adapters(
    layer: nn.MultiheadAttention, output: nn.Module, config: LoraConfig, path: str
) -> dict[str, nn.Module | nn.Parameter]:
    """Both adapters of an attention and its bare output projection, by path. Raises ``ConfigError`` as ``LoRAAttention``."""
    _refuse_fields(config, path)
    LoRAOutProj(output, config, path)  # PEFT draws it, and draws it once more after the other
    around = LoRAAttention(layer, config, path)
    return {path: around, f"{path}.out_proj": LoRAOutProj(output, config, path)}


def _refuse_fields(config: LoraConfig, path: str) -> None:
    plain = {"lora_dropout": 0.0, "lora_bias": False, "bias": "none"}
    refuse_fields(
        config, plain, f"{path} is a MultiheadAttention, whose weights are", "leave the layer out (exclude_modules)"
    )
