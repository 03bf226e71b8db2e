"""``peft.tuners``."""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.lora.config": ("LoraConfig",),
        "minilora.lora.vera_config": ("VeraConfig",),
        "minilora.lora.starts": (
            "EvaConfig",
            "LoftQConfig",
            "LoraGAConfig",
        ),
        "minilora.peft.lora_model": ("LoraModel",),
    },
)
