"""minilora: LoRA and QLoRA from scratch in PyTorch. The public names; everything else is one import deeper."""

from typing import Any

from minilora.compat import (
    PeftConfig,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    TaskType,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from minilora.errors import MiniLoraError
from minilora.linear.layers import QuantLinear
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.lora.layer import LoRALinear
from minilora.lora.tying import untie
from minilora.many.adapted import MergeReport, delete_adapter, merge, set_adapter, unload, unmerge
from minilora.many.batched import batch_adapters
from minilora.many.combine import add_weighted_adapter
from minilora.many.hotswap import hotswap_adapter
from minilora.peft_model import PeftModel, get_peft_model
from minilora.qlora.calibrate import calibrate
from minilora.qlora.kbit import prepare_model_for_kbit_training
from minilora.qlora.quantize_model import quantize_model
from minilora.quant.blockwise import quantize
from minilora.quant.codebooks import Codebook
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import QuantizedTensor
from minilora.store.export import export_adapter
from minilora.store.load import load_adapter, save_adapter
from minilora.training.check import check_adapter
from minilora.training.optim import lora_plus_groups

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs transformers is loaded when it is asked for."""
    if name == "AutoPeftModelForCausalLM":
        from minilora.hf.auto import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")


__all__ = [
    "Adapter",
    "Codebook",
    "LoRALinear",
    "LoraConfig",
    "MergeReport",
    "MiniLoraError",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForSequenceClassification",
    "QuantConfig",
    "QuantLinear",
    "QuantizedTensor",
    "TaskType",
    "add_weighted_adapter",
    "batch_adapters",
    "calibrate",
    "check_adapter",
    "delete_adapter",
    "export_adapter",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject",
    "inject_adapter_in_model",
    "load_adapter",
    "lora_plus_groups",
    "merge",
    "prepare_model_for_kbit_training",
    "quantize",
    "quantize_model",
    "register",
    "save_adapter",
    "set_adapter",
    "set_peft_model_state_dict",
    "unload",
    "unmerge",
    "untie",
]
