"""minilora: LoRA and QLoRA from scratch in PyTorch. The public names; everything else is one import deeper."""

from minilora.adapted import MergeReport, delete_adapter, merge, set_adapter, unload, unmerge
from minilora.adapter import Adapter, register
from minilora.checkpoint import load_adapter, save_adapter
from minilora.codebooks import Codebook
from minilora.config import LoraConfig, QuantConfig
from minilora.errors import MiniLoraError
from minilora.inject import inject, quantize_model
from minilora.layers import QuantLinear
from minilora.lora import LoRALinear
from minilora.peft_model import PeftModel, get_peft_model
from minilora.quantize import QuantizedTensor, quantize
from minilora.tying import untie

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Codebook",
    "LoRALinear",
    "LoraConfig",
    "MergeReport",
    "MiniLoraError",
    "PeftModel",
    "QuantConfig",
    "QuantLinear",
    "QuantizedTensor",
    "delete_adapter",
    "get_peft_model",
    "inject",
    "load_adapter",
    "merge",
    "quantize",
    "quantize_model",
    "register",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
    "untie",
]
