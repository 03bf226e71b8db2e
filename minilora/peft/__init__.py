"""PEFT's names at PEFT's places, thin over minilora: ``from minilora.peft import get_peft_model``, ``minilora.peft.tuners.lora``, ...

Nothing else in minilora knows this room. A name is imported when it is asked for. ``python -m minilora.peft script.py`` runs a script whose
``import peft`` is answered from here.
"""

from typing import Any

from minilora.lazy import lazy_names
from minilora.peft.others import OTHERS, other

__version__ = "0.22.0"  # whose names these are: what transformers 5.24 asks of peft before its own add_adapter
_known, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.lora.config": ("LoraConfig",),
        "minilora.lora.vera_config": ("VeraConfig",),
        "minilora.lora.starts": (
            "CordaConfig",
            "EvaConfig",
            "LoftQConfig",
            "LoraGAConfig",
            "LoraRuntimeConfig",
        ),
        "minilora.lora.variants.lora_ga": ("preprocess_loraga",),
        "minilora.many.convert": (
            "convert_to_lora",
            "save_as_lora",
        ),
        "minilora.many.eva": (
            "get_eva_state_dict",
            "initialize_lora_eva_weights",
        ),
        "minilora.peft.auto": (
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ),
        "minilora.peft.config": ("PeftConfig",),
        "minilora.peft.mapping": (
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "get_peft_config",
            "inject_adapter_in_model",
        ),
        "minilora.peft.peft_model": (
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
            "PeftMixedModel",
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "get_peft_model",
        ),
        "minilora.peft.status": (
            "get_layer_status",
            "get_model_status",
        ),
        "minilora.peft.lora_model": ("LoraModel",),
        "minilora.peft.utils.error": (
            "NoMatchingPeftModuleError",
            "PeftError",
        ),
        "minilora.peft.utils.loftq_utils": ("replace_lora_weights_loftq",),
        "minilora.peft.utils.peft_types": (
            "PeftType",
            "TaskType",
        ),
        "minilora.peft.utils.save_and_load": (
            "get_base_model_state_dict",
            "get_peft_model_state_dict",
            "load_peft_weights",
            "set_base_model_state_dict",
            "set_peft_model_state_dict",
        ),
        "minilora.peft.utils.warning": ("PeftWarning",),
        "minilora.qlora.kbit": ("prepare_model_for_kbit_training",),
        "minilora.training.precision": ("cast_mixed_precision_params",),
    },
)


def __getattr__(name: str) -> Any:
    return other(name) if name in OTHERS else _known(name)
