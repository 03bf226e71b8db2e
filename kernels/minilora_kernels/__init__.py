"""Triton kernels for LoRA over weights of 4 or 2 bits, stored as bitsandbytes stores them. Imports torch and triton only.

In order of reading: ``weight`` (what is stored), ``lookup`` (code to number), ``dequant``, ``linear``, ``dgrad``, ``grouped`` (both for
a mixture of experts), ``lowrank``, ``gemv``, ``quantize``; ``launch`` has the tile sizes. Beside each kernel stands a reference of a few
lines that says what it computes. What has been run on hardware says ``docs/kernels.md``. Next file: ``weight.py``.
"""

from minilora_kernels.dequant import dequant_reference, nf4_dequant
from minilora_kernels.dgrad import dgrad_reference, nf4_dgrad
from minilora_kernels.gemv import gemv_fits, gemv_reference, nf4_gemv
from minilora_kernels.grouped import (
    grouped_dgrad,
    grouped_dgrad_reference,
    grouped_linear,
    grouped_linear_reference,
)
from minilora_kernels.launch import supported
from minilora_kernels.linear import linear_reference, nf4_linear
from minilora_kernels.lowrank import (
    lora_bwd_a,
    lora_bwd_a_reference,
    lora_bwd_b,
    lora_bwd_b_reference,
    lora_down,
    lora_down_reference,
)
from minilora_kernels.quantize import nf4_quantize, quantize_reference
from minilora_kernels.weight import Weight

__all__ = [
    "Weight",
    "dequant_reference",
    "dgrad_reference",
    "gemv_fits",
    "gemv_reference",
    "grouped_dgrad",
    "grouped_dgrad_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "linear_reference",
    "lora_bwd_a",
    "lora_bwd_a_reference",
    "lora_bwd_b",
    "lora_bwd_b_reference",
    "lora_down",
    "lora_down_reference",
    "nf4_dequant",
    "nf4_dgrad",
    "nf4_gemv",
    "nf4_linear",
    "nf4_quantize",
    "quantize_reference",
    "supported",
]
