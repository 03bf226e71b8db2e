"""minilora: LoRA and QLoRA from scratch in PyTorch. The public names; everything else is one import deeper."""

from minilora.adapted import MergeReport, delete_adapter, merge, set_adapter, unload, unmerge
from minilora.adapter import Adapter, register
from minilora.batched import batch_adapters
from minilora.checkpoint import load_adapter, save_adapter
from minilora.codebooks import Codebook
from minilora.combine import add_weighted_adapter
from minilora.config import LoraConfig, QuantConfig
from minilora.errors import MiniLoraError
from minilora.export import export_adapter
from minilora.hotswap import hotswap_adapter
from minilora.inject import inject, quantize_model
from minilora.layers import QuantLinear
from minilora.lora import LoRALinear
from minilora.optim import lora_plus_groups
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
    "add_weighted_adapter",
    "batch_adapters",
    "delete_adapter",
    "export_adapter",
    "get_peft_model",
    "hotswap_adapter",
    "inject",
    "load_adapter",
    "lora_plus_groups",
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
