# What __init__.py imports lazily, for mypy and editors; tests/test_public_names.py holds the two equal.
from minilora.errors import MiniLoraError as MiniLoraError
from minilora.export.folders import export_adapter as export_adapter
from minilora.job.finetune import fine_tune as fine_tune
from minilora.job.settings import Job as Job
from minilora.linear.packed import QuantLinear as QuantLinear
from minilora.lora.adapter import Adapter as Adapter
from minilora.lora.config import LoraConfig as LoraConfig
from minilora.lora.inject import inject as inject
from minilora.lora.layer import LoRALinear as LoRALinear
from minilora.lora.tying import untie as untie
from minilora.lora.variants import register as register
from minilora.many.adapted import delete_adapter as delete_adapter
from minilora.many.adapted import set_adapter as set_adapter
from minilora.many.adapted import unload as unload
from minilora.many.batched import batch_adapters as batch_adapters
from minilora.many.combine import add_weighted_adapter as add_weighted_adapter
from minilora.many.hotswap import hotswap_adapter as hotswap_adapter
from minilora.many.merging import MergeReport as MergeReport
from minilora.many.merging import merge as merge
from minilora.many.merging import unmerge as unmerge
from minilora.peft import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from minilora.peft import PeftConfig as PeftConfig
from minilora.peft import PeftModel as PeftModel
from minilora.peft import PeftModelForCausalLM as PeftModelForCausalLM
from minilora.peft import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from minilora.peft import TaskType as TaskType
from minilora.peft import get_peft_model as get_peft_model
from minilora.peft import get_peft_model_state_dict as get_peft_model_state_dict
from minilora.peft import inject_adapter_in_model as inject_adapter_in_model
from minilora.peft import set_peft_model_state_dict as set_peft_model_state_dict
from minilora.qlora.calibrate import calibrate as calibrate
from minilora.qlora.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from minilora.qlora.quantize_model import quantize_model as quantize_model
from minilora.quant.blockwise import quantize as quantize
from minilora.quant.codebooks import Codebook as Codebook
from minilora.quant.codebooks import register_codebook as register_codebook
from minilora.quant.config import QuantConfig as QuantConfig
from minilora.quant.quantized import QuantizedTensor as QuantizedTensor
from minilora.store.load import load_adapter as load_adapter
from minilora.store.load import save_adapter as save_adapter
from minilora.training.check import check_adapter as check_adapter
from minilora.training.optim import lora_plus_groups as lora_plus_groups
from minilora.training.optim_adamw8 import AdamW8bit as AdamW8bit

__version__: str
__all__: list[str]
