"""The default targets equal PEFT's, and name linear layers that the installed transformers builds."""

import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from transformers.pytorch_utils import Conv1D

from minilora.lora.architectures import ADDED_ROWS, DEFAULT_TARGETS, PEFT_ROWS

AUTO_CLASSES = [
    getattr(transformers, name)
    for name in (
        "AutoModelForSeq2SeqLM",
        "AutoModelForImageTextToText",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForTextToWaveform",
        "AutoModelForCausalLM",
        "AutoModel",
    )
]

# Fields without which a default config of the type builds no model, or none of the layers that released models have.
# Several entries: the type has several forms, and each name of the row has to exist in at least one of them.
CONFIGS = {
    "blip-2": [{}, {"text_config": {"model_type": "t5"}}],
    "aya_vision": [{"vision_config": {"model_type": "siglip_vision_model"}}],
    "bamba": [{"num_hidden_layers": 2, "attn_layer_indices": [1]}],
    "chameleon": [{"vocabulary_map": {"<image>": 4}}],
    "dbrx": [{"attn_config": {"rope_theta": 1e4}}],
    "dots1": [{"n_routed_experts": 4, "n_shared_experts": 1}],
    "emu3": [{"vocabulary_map": {"<image>": 4}}],
    "esm": [{"vocab_size": 33, "pad_token_id": 1}],
    "granitemoehybrid": [{"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}],
    "hunyuan_v1_dense": [{"head_dim": 128}],
    "hunyuan_v1_moe": [{"head_dim": 128}],
    "lfm2_moe": [{"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}],
    "ministral": [{"head_dim": 128}],
    "nemotron": [{"num_key_value_heads": 8}],
}

# Rows whose names are not looked up, and why.
REMOTE = "its code lies on the Hugging Face Hub, not in transformers"
UNBUILDABLE = {
    "btlm": REMOTE,
    "chatglm": REMOTE,
    "RefinedWeb": REMOTE,
    "RefinedWebModel": REMOTE,
    "rwkv7": REMOTE,
    "gemma3n": "its vision tower needs timm; the language model is looked up as gemma3n_text",
}


def linear_names(model_type: str, fields: dict) -> list[str]:
    """Dotted names of the linear layers of a model of this type, built without memory on the meta device."""
    config = transformers.AutoConfig.for_model(model_type, **fields)
    assert config.model_type == model_type, "an alias: no model's config carries this model type"
    auto = next(auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping)
    with torch.device("meta"):
        model = auto.from_config(config)
    return [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


def test_rows_of_peft_are_equal():
    assert set(" ".join(PEFT_ROWS.values()).split()) == set(PEFT_TARGETS)
    for model_type, expected in PEFT_TARGETS.items():
        got = DEFAULT_TARGETS[model_type]
        assert (got if isinstance(expected, str) else sorted(got)) == (
            expected if isinstance(expected, str) else sorted(expected)
        ), model_type


def test_no_model_type_stands_twice():
    listed = " ".join([*PEFT_ROWS.values(), *ADDED_ROWS.values()]).split()
    assert len(listed) == len(set(listed)) == len(DEFAULT_TARGETS)


def test_exceptions_are_rows():
    assert CONFIGS.keys() | UNBUILDABLE.keys() <= DEFAULT_TARGETS.keys()


@pytest.mark.parametrize("model_type", DEFAULT_TARGETS)
def test_every_name_is_a_linear_layer(model_type):
    if model_type in UNBUILDABLE:
        pytest.skip(UNBUILDABLE[model_type])
    names = [name for fields in CONFIGS.get(model_type, [{}]) for name in linear_names(model_type, fields)]
    targets = DEFAULT_TARGETS[model_type]
    if isinstance(targets, str):
        assert any(re.fullmatch(targets, name) for name in names)
    else:
        absent = [target for target in targets if not any(("." + name).endswith("." + target) for name in names)]
        assert not absent, f"{absent} not among {sorted({name.split('.')[-1] for name in names})}"
