"""``peft.tuners.lora.layer``."""

from minilora.peft.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, MultiheadAttention, ParamWrapper

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention", "ParamWrapper"]
