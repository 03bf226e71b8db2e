"""Every architecture of the installed transformers, tiny: its default config with small numbers, built on the CPU without any file.

The list is transformers' own, ``CONFIG_MAPPING`` and the mappings of its auto classes, so that a new release adds its own. A rule on the
names of config fields makes a config small; what the rule does not fit stands in ``fields.py``.
"""

import copy
import re
import warnings

import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.architectures.fields import FIELDS, HEADS

# Heads with a loss first; a type takes the first that it has.
AUTO = (
    "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM", "CTC", "MULTIMODAL_LM",
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION", "DEPTH_ESTIMATION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "QUESTION_ANSWERING",
    "TIME_SERIES_PREDICTION", "MASKED_IMAGE_MODELING", "PRETRAINING", "UNIVERSAL_SEGMENTATION", "ZERO_SHOT_OBJECT_DETECTION",
    "MASK_GENERATION",
)  # fmt: skip


def model_types() -> list[str]:
    """Every model type for which some auto class has a model."""
    known = set()
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("_NAMES"):
            known |= set(getattr(modeling_auto, name))
    return sorted(known & set(transformers.CONFIG_MAPPING.keys()))


def model_class(config):
    """The class with a head and a loss, or the bare one. Raises ``KeyError`` where the type stands in other mappings only."""
    for task in (*HEADS.get(config.model_type, AUTO), None):
        name = "MODEL_MAPPING" if task is None else f"MODEL_FOR_{task}_MAPPING"
        mapping = getattr(modeling_auto, name)
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise KeyError(f"{config.model_type} has no head that is tried here")


# What a field becomes, by the first pattern that its name matches; a callable gets the old value. None leaves it.
WIDTH, INNER, HEADS_, LAYERS, VOCABULARY, LENGTH, IMAGE, PATCH = 64, 96, 4, 2, 128, 64, 32, 8
RULES = [
    (r".*(token|tok)_?(id|index|idx)s?", None),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups", 1),
    (r".*_multiplier|scale|.*temperature|.*theta|.*_coefficient|.*_cost|.*max_distance|.*stride|.*ratio|.*factor|.*padding", None),
    (r"upsample_groups", WIDTH),
    (r".*(kernel|kernel_size|d_conv|_groups)", None),
    (r"conv_kernel_size|depthwise_kernel.*", 3),
    (r"(num_)?(experts_per_tok(en)?|moe_topk|moe_k|top_?k|num_selected_experts)", 2),
    (r".*(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r".*(first_k_dense_replace|n_shared_experts|num_shared_experts)", 1),
    (r".*(key_value_heads|kv_heads|num_key_heads)", 2),
    (r"qk_head_dim", 32),
    (r".*(num_value_heads)", 4),
    (r"mamba_(n|num)_heads", 8),
    (r".*(heads?|heads_per_layer|n_heads?|attention_heads?)", HEADS_),
    (r".*(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|head_dim|d_kv|kv_channels|d_head|dim_head|head_size)", 16),
    (r"rotary_dim", 8),
    (r"query_pre_attn_scalar", 16),
    (r"type_vocab_size", None),
    (r"codebook_size|n_codes|num_codes", 64),
    (r".*vocab_size.*|.*num_embeddings|.*codebook_size", VOCABULARY),
    (r"attention_window", 4),
    (r"num_feat_extract_layers", None),
    (r".*(layers|n_layer|depth|num_blocks|n_blocks|num_encoder_blocks)", LAYERS),
    (r".*(max_position_embeddings|max_(source|target)_positions|n_positions|n_ctx|context_length|block_size|seq_len|seq_length)", LENGTH),
    (r".*(sliding_window|local_attention|window_length|max_2d_position_embeddings|attention_chunk_size)", LENGTH),
    (r".*image_size|crop_size|resolution|input_size", IMAGE),
    (r".*temporal_patch_size|spatial_merge_size|merge_size", None),
    (r".*patch_size", lambda old: PATCH if old > PATCH else old),
    (r".*window_size", lambda old: IMAGE if old > 64 else 4),
    (r".*num_mel_bins|.*mel_dim|n_mels|n_mel_bins", 16),
    (r".*num_channels|in_chans|in_channels|audio_channels", None),
    (r".*(num_queries|num_query_tokens|num_image_tokens|mm_tokens_per_image|n_latents|num_latents)", 4),
    (r".*(max_.*|num_frames.*)", None),
    (r".*(intermediate_size|ffn_dim|d_ff|intermediate|ffn_hidden_size|mlp_dim|linear_units|inner)", INNER),
    (r".*(ff_dim|intermediate_dim|feedforward_dim|n_inner)", INNER),
    (r".*(size|dim|dims|width|channels?|filters|units|rank|d_model|n_embd|embed|dimension|features|d_state|hidden)", WIDTH),
]  # fmt: skip
_RULES = [(re.compile(pattern), new) for pattern, new in RULES]


def small(name: str, old: int) -> int:
    """What the rule makes of one integer."""
    for pattern, new in _RULES:
        if pattern.fullmatch(name):
            made = old if new is None else new(old) if callable(new) else new
            return min(old, made)
    return old


def small_list(name: str, old: list, before: int | None, layers: int) -> list:
    """What it makes of a list, whose entries belong to layers, to stages or to places in a table.

    Args:
        before: how many layers the config had. layers: how many it has now.
    """
    if name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        return (list(dict.fromkeys(old)) * layers)[:layers]
    if name == "attention_window":
        return [LAYERS * 2] * layers
    if not all(isinstance(x, int) for x in old):
        return old[:layers] if before and len(old) == before > layers else old
    if re.search(r"depths|num_blocks|block_repeats|blocks_per_stage|numb_of_layers", name):
        return [1] * len(old)
    if name == "mrope_section":
        return [4, 2, 2]
    if before and len(old) == before > layers:  # one for each layer
        old = old[:layers]
        return old if max(old) <= before else [small(name.removesuffix("_per_layer"), x) for x in old]
    if re.search(r"(indexes|indices|idxs|_layers|layer_ids|indx)$", name):
        return [x for x in dict.fromkeys(old) if x < layers] or [layers - 1]
    if re.search(r"num_heads|attention_heads|heads_per_stage", name):
        return [min(2, x) for x in old]
    if name == "image_size":
        return [min(x, IMAGE) for x in old]
    if re.search(r"hidden_sizes|conv_dim|tdnn_dim|embed_dim|channels|feature_dims|_dims|out_features", name):
        least = min(old)
        return [min(x, max(1, x * 16 // least), 128) for x in old] if least > 16 else [min(x, 64) for x in old]
    return old


ROPE = ("rope_parameters", "rope_scaling")
MROPE = re.compile(
    "vl|omni|glm4v|glm46v|glm_ocr|glm_image|glmga|glm4_?5v"
)  # sections stand in their code where the config has none
LEFT = ("id2label", "label2id", "task_specific_params")
DROPPED = (
    "out_features",
    "out_indices",
    "stage_names",
    "_out_features",
    "_out_indices",
)  # follow from the number of layers


def shrink(fields: dict) -> dict:
    """A config's dictionary with small numbers, its sub-configs too."""
    new = {}
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    layers = max(LAYERS, len(set(map(str, kinds)))) if isinstance(kinds, list) and kinds else LAYERS
    before = fields.get("num_hidden_layers")
    for name, old in fields.items():
        if name in DROPPED and ("stage_names" in fields or "out_indices" in fields):
            continue
        if isinstance(old, dict) and name == "per_layer_config":
            new[name] = {key: value for key, value in old.items() if int(key) < layers}
        elif isinstance(old, dict) and name not in LEFT:
            new[name] = shrink(old)
        elif isinstance(old, bool) or old is None:
            new[name] = old
        elif isinstance(old, int):
            new[name] = layers if name == "num_hidden_layers" and old > layers else small(name, old)
        elif isinstance(old, (list, tuple)) and old:
            new[name] = small_list(name, list(old), before, layers)
        else:
            new[name] = old
    for name, old in fields.items():  # as many keys as queries stay as many
        queries = name.replace("key_value_heads", "attention_heads").replace("num_key_heads", "num_value_heads")
        if queries != name and isinstance(old, int) and fields.get(queries) == old:
            new[name] = new[queries]
    if isinstance(new.get("rope_parameters"), dict) and MROPE.search(str(new.get("model_type"))):
        new["rope_parameters"]["mrope_section"] = [4, 2, 2]
    return tokens_inside(new)


def tokens_inside(fields: dict) -> dict:
    """Special tokens inside the small vocabulary."""
    size = fields.get("vocab_size")
    size = size if isinstance(size, int) and size > 1 else VOCABULARY
    taken = {
        v for k, v in fields.items() if re.search(r"(token|tok)_?(id|index)$", k) and isinstance(v, int) and v < size
    }
    free = [n for n in range(size - 1, 0, -1) if n not in taken]
    seen: dict[int, int] = {}
    for name, value in fields.items():
        if (
            re.search(r"(token|tok)_?(id|index)$", name)
            and isinstance(value, int)
            and not isinstance(value, bool)
            and value >= size
        ):
            if value not in seen:
                seen[value] = free.pop(0)
            fields[name] = seen[value]
    return fields


def merge_fields(fields: dict, more: dict) -> dict:
    """``more`` into ``fields``, sub-configs entry by entry."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            merge_fields(fields[name], value)
        else:
            fields[name] = value
    return fields


def tiny_config(model_type: str, more: dict | None = None):
    """The config of a type, small, with ``more`` fields put over it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = transformers.CONFIG_MAPPING[model_type]
        fields = merge_fields(shrink(kind().to_dict()), FIELDS.get(model_type, {}))
        fields = merge_fields(fields, copy.deepcopy(more or {}))
        for name in ("transformers_version", "architectures", "_name_or_path", "dtype"):
            fields.pop(name, None)
        return kind.from_dict(fields)


def build(model_type: str, seed: int = 0, more: dict | None = None):
    """The model in eval mode with every number drawn at random, so that no gate is shut and no bias zero."""
    config = tiny_config(model_type, more)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = model_class(config)
        with torch.device("meta"):
            count = sum(p.numel() for p in kind(config).parameters())
        if count > 4_000_000:
            raise OverflowError(f"{count / 1e6:.1f} million parameters")
        return drawn(kind(config).float().eval(), seed)


def drawn(model, seed: int = 0):
    """The model with every number drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    many = {id(p) for module in model.modules() if "Experts" in type(module).__name__ for p in module.parameters(False)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.is_floating_point():
                inputs = parameter.shape[-1] if id(parameter) in many else parameter[:1].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, inputs) ** 0.5)
    return model
