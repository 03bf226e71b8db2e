"""``peft.tuners.lora``."""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.lora.config": ("LoraConfig",),
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
        "minilora.peft.layers": (
            "Conv1d",
            "Conv2d",
            "Conv3d",
            "Embedding",
            "Linear",
            "LoraLayer",
            "MultiheadAttention",
            "ParamWrapper",
        ),
        "minilora.peft.lora_model": ("LoraModel",),
    },
)
