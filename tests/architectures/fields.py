"""What the general rule does not fit: fields of configs, batches, heads."""

import torch


def _words(config, **more):
    from tests.architectures.batches import text_ids

    ids = text_ids(config)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 16}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}

# By model type: fields put over the small config.
FIELDS: dict = {
    "bamba": {**_MIXER, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "falcon_h1": _MIXER,
    "granitemoehybrid": {**_MIXER, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "time_series_transformer": {"prediction_length": 4},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xlnet": {"d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "reformer": {"is_decoder": True},
    "swin": {"embed_dim": 16},
    "swinv2": {"embed_dim": 16},
    "donut-swin": {"embed_dim": 16},
    "maskformer-swin": {"embed_dim": 16},
    "focalnet": {"embed_dim": 16},
    "mgp-str": {"image_size": [16, 32]},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "mobilebert": {"true_hidden_size": 64, "intra_bottleneck_size": 64, "embedding_size": 64},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zamba2": {"num_hidden_layers": 2, "mamba_headdim": 16, "n_mamba_heads": 8, "hybrid_layer_ids": [1]},
}

# By model type: heads to try instead of the usual order.
HEADS: dict = {}

# By model type: a function of the config that makes the batch.
BATCHES: dict = {}
