"""``peft.utils``."""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.peft.utils.error": (
            "NoMatchingPeftModuleError",
            "PeftError",
        ),
        "minilora.peft.utils.loftq_utils": ("replace_lora_weights_loftq",),
        "minilora.peft.utils.other": (
            "CONFIG_NAME",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "SAFETENSORS_WEIGHTS_NAME",
            "WEIGHTS_NAME",
            "infer_device",
        ),
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
        "minilora.peft.wrappers": (
            "AuxiliaryTrainingWrapper",
            "ModulesToSaveWrapper",
            "TrainableTokensWrapper",
        ),
        "minilora.qlora.kbit": ("prepare_model_for_kbit_training",),
        "minilora.training.precision": ("cast_mixed_precision_params",),
    },
)
