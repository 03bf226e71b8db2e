"""The names of PEFT's methods that are not LoRA, so that a script which imports many of them runs as long as it uses LoRA.

Each is a class that refuses, by name, to be made; no object is an instance of one.
"""

from __future__ import annotations

from typing import Any

from minilora.errors import ConfigError
from minilora.lora.config_file import PEFT_LAYOUT

__all__ = ["OTHERS", "other"]

_NAMES = """
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel
    AdaptionPromptConfig AdaptionPromptModel ArrowConfig BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig C3AModel
    CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig DeloraModel FourierFTConfig
    FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HRAConfig HRAModel HiraConfig HiraModel
    IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig LoKrModel
    MissConfig MissModel MontecloraConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig
    OSFModel PeanutConfig PeanutModel PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder
    PromptEncoderConfig PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig
    PsoftModel PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig
    ShiraModel SupertuningConfig SupertuningModel TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel
    UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeloraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig
    XLoraModel bloom_model_postprocess_past_key_value compose_cartridge_adapters create_arrow_model find_kappa_target_modules
    initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values
    shift_tokens_right
"""
OTHERS = frozenset(_NAMES.split())
_made: dict[str, type] = {}


def other(name: str) -> type:
    """The class of one of PEFT's other methods. Making an object of it raises ``ConfigError``."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"{name}: minilora has LoRA and its variants, and not this part of PEFT {PEFT_LAYOUT}; run the script with PEFT for it"
        )

    if name not in _made:
        _made[name] = type(name, (), {"__new__": refuse, "__module__": "minilora.peft", "__doc__": "Not in minilora."})
    return _made[name]
