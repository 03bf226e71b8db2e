"""Every class of experts of the installed transformers: the tiny model in which it stands, and what the class is like.

The list of classes is transformers' own source: those that are decorated with ``use_experts_implementation``, and those that hold bare
matrices of experts without it. A class is examined in the whole model where that can be made tiny, else in a mixture of a router and it.
"""

import importlib
import re
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

from minilora.linear.experts.known import BY_NAME
from tests.architectures import tiny

_GEMMA = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 36, "enable_moe_block": True}

# Class to the model type in whose tiny model it stands, and fields that are put over that model's config.
MODELS = {
    "AfmoeExperts": ("afmoe", {}),
    "AriaExperts": ("aria_text", {}),
    "AXK1Experts": ("axk1", {}),
    "AXK2Experts": ("axk2", {}),
    "BailingHybridExperts": ("bailing_hybrid", {}),
    "BeamExperts": ("beam", {}),
    "Cohere2MoeExperts": ("cohere2_moe", {}),
    "DbrxExperts": ("dbrx", {}),
    "DeepseekV2Experts": ("deepseek_v2", {}),
    "DeepseekV32Experts": ("deepseek_v32", {}),
    "DeepseekV3Experts": ("deepseek_v3", {}),
    "DeepseekV4Experts": ("deepseek_v4", {}),
    "DiffusionGemmaTextExperts": ("diffusion_gemma", {"text_config": _GEMMA}),
    "Dots1Experts": ("dots1", {}),
    "Ernie4_5_MoeExperts": ("ernie4_5_moe", {}),
    "ExaoneMoeExperts": ("exaone_moe", {}),
    "FlexOlmoExperts": ("flex_olmo", {}),
    "FlintExperts": ("flint", {"mlp_only_layers": [0]}),
    "Gemma4TextExperts": ("gemma4_text", _GEMMA),
    "Glm4MoeExperts": ("glm4_moe", {}),
    "Glm4MoeLiteExperts": ("glm4_moe_lite", {}),
    "Glm4vMoeTextExperts": ("glm4v_moe_text", {}),
    "Glm5NextTextExperts": ("glm5_next_text", {}),
    "GlmMoeDsaExperts": ("glm_moe_dsa", {}),
    "GptOssExperts": ("gpt_oss", {}),
    "GraniteMoeExperts": ("granitemoe", {}),
    "GraniteMoeHybridExperts": ("granitemoehybrid", {}),
    "GraniteMoeSWAExperts": ("granitemoe_swa", {}),
    "GraniteMoeSharedExperts": ("granitemoeshared", {}),
    "HYV3Experts": ("hy_v3", {}),
    "HYV4Experts": ("hy_v4", {}),
    "HYV4VLExperts": ("hy_v4_vl_text", {}),
    "HunYuanMoEV1Experts": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "Inkling2Experts": ("inkling2_text", {}),
    "Inkling2LoopExperts": ("inkling2_loop_text", {}),
    "InklingExperts": ("inkling_text", {"n_shared_experts": 2}),
    "InklingSharedExperts": ("inkling_text", {"n_shared_experts": 2}),
    "JambaExperts": ("jamba", {}),
    "JetMoeParallelExperts": ("jetmoe", {}),
    "KimiLinearExperts": ("kimi_linear", {}),
    "Kolibri1Experts": ("kolibri1", {}),
    "LagunaExperts": ("laguna", {}),
    "LaraMiniExperts": ("lara_mini", {}),
    "Lfm2MoeExperts": ("lfm2_moe", {"num_dense_layers": 1}),
    "Llama4TextExperts": ("llama4_text", {}),
    "LongcatFlashExperts": ("longcat_flash", {"zero_expert_num": 3}),
    "MellumExperts": ("mellum", {}),
    "MiMoV2FlashExperts": ("mimo_v2_flash", {}),
    "MiniMaxExperts": ("minimax", {}),
    "MiniMaxM2Experts": ("minimax_m2", {}),
    "MiniMaxM3VLExperts": ("minimax_m3_vl_text", {}),
    "Mistral4Experts": ("mistral4", {}),
    "MistralLarge4TextExperts": ("mistral_large4_text", {}),
    "MixtralExperts": ("mixtral", {}),
    "MuseSparkExperts": ("muse_spark_text", {}),
    "NemotronHExperts": ("nemotron_h", {}),
    "OlmoeExperts": ("olmoe", {}),
    "OpenAIPrivacyFilterExperts": ("openai_privacy_filter", {}),
    "PhimoeExperts": ("phimoe", {}),
    "Qwen2MoeExperts": ("qwen2_moe", {}),
    "Qwen3MoeExperts": ("qwen3_moe", {}),
    "Qwen3NextExperts": ("qwen3_next", {}),
    "Qwen3OmniMoeThinkerTextExperts": ("qwen3_omni_moe_thinker", {}),
    "Qwen3VLMoeTextExperts": ("qwen3_vl_moe_text", {}),
    "Qwen3_5MoeExperts": ("qwen3_5_moe_text", {}),
    "SolarOpenExperts": ("solar_open", {}),
    "UnlimitedOcrTextExperts": ("unlimited_ocr", {}),
    "ZayaExperts": ("zaya", {}),
}
# Classes whose models are not made tiny here: what the class itself reads of its config.
_SIZES = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "hidden_size": 44,
    "moe_intermediate_size": 28,
    "hidden_act": "silu",
}
ALONE = {
    "DeepseekOcr2TextExperts": ("deepseek_ocr2", _SIZES),
    "Dots3NoteExperts": ("dots3_note", _SIZES),
    "Qwen3OmniMoeTalkerTextExperts": ("qwen3_omni_moe", _SIZES),
    "Ernie4_5_VLMoeMoeExperts": ("ernie4_5_vl_moe", _SIZES),
    "Qwen4ExpTextExperts": ("qwen4_exp", _SIZES),
    "Step3p7Experts": ("step3p7", _SIZES),
}
CLASSES = sorted([*MODELS, *ALONE])


class Router(nn.Module):
    """The two best of four by a softmax."""

    def __init__(self, experts: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x):
        weights, index = torch.softmax(nn.functional.linear(x, self.weight), -1).topk(2, dim=-1)
        return index, weights


class Mixture(nn.Module):
    """A class of experts with a router before it and a linear layer behind it."""

    def __init__(self, kind: type[nn.Module], config):
        super().__init__()
        self.config = config
        self.gate, self.experts = Router(config.num_experts, config.hidden_size), kind(config)
        self.out = nn.Linear(config.hidden_size, 3)

    def forward(self, x):
        flat = x.flatten(0, 1)
        return self.out(self.experts(flat, *self.gate(flat))).view(*x.shape[:2], -1)


def build(name: str) -> nn.Module:
    """A tiny model with experts of this class in it, in eval mode."""
    if name in MODELS:
        model_type, fields = MODELS[name]
        return tiny.build(model_type, more=fields)
    folder, sizes = ALONE[name]
    config = transformers.PretrainedConfig()
    for field, value in sizes.items():
        setattr(config, field, value)
    config._experts_implementation = "grouped_mm"
    kind = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.drawn(Mixture(kind, config).eval())


def batch_for(model: nn.Module) -> dict:
    """A batch of this model, without labels that a mixture alone does not take."""
    from tests.architectures import batches

    return {"x": batches.draw(2, 9, 44)} if isinstance(model, Mixture) else batches.batch_for(model)


def of_class(model: nn.Module, name: str) -> list[str]:
    """Paths of the experts of this class in a model."""
    return [path for path, module in model.named_modules() if type(module).__name__ == name]


def sources():
    """The name and text of every modeling file of transformers."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        yield path, path.read_text(encoding="utf-8")


_DECORATED = re.compile(r"^@use_experts_implementation\b[^\n]*\n(?:[^\n]*\n){0,3}?class (\w+)", re.M)


def decorated() -> list[str]:
    """Every class that carries transformers' mark of experts."""
    return sorted({name for _, text in sources() for name in _DECORATED.findall(text)})


def of_own_shape() -> list[str]:
    """The classes that minilora knows by their names, which transformers must have."""
    known = {name for _, text in sources() for name in re.findall(r"^class (\w+)\(", text, re.M)}
    return sorted(set(BY_NAME) & known)


_THREE = re.compile(r"nn\.Parameter\(\s*torch\.(?:empty|zeros|ones|randn?)\(\s*\(?([^()]*)\)?\s*\)", re.S)


def three_dimensional() -> dict[str, str]:
    """Classes with a parameter of three sizes, and the sizes: where experts without a mark would be."""
    found = {}
    for _, text in sources():
        for part in re.split(r"^(?=class )", text, flags=re.M):
            for sizes in _THREE.findall(part):
                if len([size for size in sizes.rstrip(", \n").split(",") if size.strip()]) == 3 and (
                    name := re.match(r"class (\w+)", part)
                ):
                    found[name[1]] = " ".join(sizes.split())
    return found


_MARKS = {
    "is_transposed=True": "weights `[E, in, out]`",
    "is_concatenated=False": "gate and up interleaved",
    "has_bias=True": "biases",
    "has_gate=False": "no gate",
    "has_post_expert_norm=True": "a norm behind each expert",
}
_OWN = {
    "DbrxExperts": "one matrix for all experts, `[E * I, H]`, three of them",
    "InklingSharedExperts": "every token goes through all of them; gate and up apart",
    "JetMoeParallelExperts": "one projection, of rows that are sorted already",
    "Llama4TextExperts": "weights `[E, in, out]`; the scores come before the experts",
    "LongcatFlashExperts": "some experts return the token itself; up and down count otherwise",
    "Step3p7Experts": "a gate of its own",
}


def about() -> dict[str, str]:
    """Class to how it differs from the usual one, in words, read in the source."""
    found = dict(_OWN)
    for _, text in sources():
        for part in re.split(r"^(?=@use_experts_implementation)", text, flags=re.M)[1:]:
            head, _, body = part.partition("class ")
            name, own = re.match(r"\w+", body)[0], re.split(r"\n(?=\S)", body)[0]
            said = [words for mark, words in _MARKS.items() if mark in head]
            found[name] = ", ".join(said + ["a gate of its own"] * ("def _apply_gate" in own))
    return found


def model_type(name: str) -> str:
    """The model type in which a class is found: that of the tiny model, or of its file."""
    return MODELS[name][0] if name in MODELS else ALONE[name][0]
