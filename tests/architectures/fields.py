"""What the general rule does not fit: fields of configs, batches, heads."""

import torch


def _words(config, **more):
    from tests.architectures.batches import text_ids

    ids = text_ids(config)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SWIN = {"embed_dim": 16}
_FORECAST = {"prediction_length": 4}
_ONE_TILE = {"image_grid_pinpoints": [[32, 32]]}
_STAGES = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_SAM = {
    "prompt_encoder_config": {"image_embedding_size": 4, "hidden_size": 64},
    "mask_decoder_config": {"hidden_size": 64},
    "vision_config": {"output_channels": 64, "num_pos_feats": 32},
}
_SPEECH_WINDOW = {"window_size": 15, "downsample_rate": 5}
_FOUR_IN_ONE = {"audio_config": {"intermediate_size": 256}}  # four frames of width 64 go to the language model as one
_MEDIA_TOKENS = {
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
    "audio_start_token_id": 7,
    "audio_end_token_id": 8,
}

# By model type: fields put over the small config.
FIELDS: dict = {
    "autoformer": _FORECAST,
    "bamba": {**_MIXER, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "depth_anything": {"backbone_config": _STAGES},
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "falcon_h1": {**_MIXER, "mamba_d_ssm": 128},
    "focalnet": _SWIN,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "glmasr": _FOUR_IN_ONE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"], "num_layers": 2},
    "granite_speech": _SPEECH_WINDOW,
    "granite_speech_plus": _SPEECH_WINDOW,
    "granitemoehybrid": {**_MIXER, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": _FORECAST,
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llava_next": _ONE_TILE,
    "llava_next_video": _ONE_TILE,
    "llava_onevision": _ONE_TILE,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "maskformer-swin": _SWIN,
    "mgp-str": {"image_size": [16, 32]},
    "ministral": {"head_dim": 16},
    "mistral4": {"rope_parameters": {"partial_rotary_factor": 1.0}},
    "mllama": {"vision_config": {"vision_output_dim": 128}},
    "mobilebert": {"true_hidden_size": 48, "intra_bottleneck_size": 48, "embedding_size": 32},
    "musicflamingo": _FOUR_IN_ONE,
    "nemotron": {"num_key_value_heads": 2},
    "prompt_depth_anything": {"backbone_config": _STAGES},
    "qwen2_5_omni_thinker": _MEDIA_TOKENS,
    "qwen3_omni_moe_thinker": _MEDIA_TOKENS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8], "num_buckets": 4},
    "sam": _SAM,
    "sam_hq": _SAM,
    "swin": {**_SWIN, "depths": [1, 1], "num_heads": [2, 2]},
    "swinv2": _SWIN,
    "time_series_transformer": _FORECAST,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral": _FOUR_IN_ONE,
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "mamba_headdim": 16, "n_mamba_heads": 8, "hybrid_layer_ids": [1], "attention_head_dim": 32},
    "zoedepth": {"backbone_config": _STAGES},
}  # fmt: skip

# By model type: heads to try instead of the usual order.
HEADS: dict = {"musicgen": ("TEXT_TO_WAVEFORM",), "musicgen_melody": ("TEXT_TO_WAVEFORM",)}


def _draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _series(config):
    past = config.context_length + max(config.lags_sequence)
    times = config.num_time_features
    return {
        "past_values": _draw(2, past).abs(),
        "past_time_features": _draw(2, past, times),
        "past_observed_mask": torch.ones(2, past),
        "future_values": _draw(2, config.prediction_length).abs(),
        "future_time_features": _draw(2, config.prediction_length, times),
    }


def _decisions(config):
    return {
        "states": _draw(2, 6, config.state_dim),
        "actions": _draw(2, 6, config.act_dim),
        "rewards": _draw(2, 6, 1),
        "returns_to_go": _draw(2, 6, 1),
        "timesteps": torch.arange(6).expand(2, 6),
        "attention_mask": torch.ones(2, 6),
    }


# By model type: a function of the config that makes the batch.
BATCHES: dict = {
    "autoformer": _series,
    "blip_2_qformer": lambda config: {
        "query_embeds": _draw(2, 4, config.hidden_size),
        "encoder_hidden_states": _draw(2, 6, config.encoder_hidden_size),
    },
    "decision_transformer": _decisions,
    "informer": _series,
    "lxmert": lambda config: _words(
        config, visual_feats=_draw(2, 4, config.visual_feat_dim), visual_pos=_draw(2, 4, 4).abs()
    ),
    "pix2struct": lambda config: {
        "flattened_patches": torch.cat((torch.arange(1, 9).view(1, 8, 1).expand(2, 8, 2).float(), _draw(2, 8, 62)), -1),
        "decoder_input_ids": torch.tensor([[3, 4, 5]] * 2),
    },
    "reformer": lambda config: {"input_ids": torch.arange(1, 65).expand(2, 64).contiguous()},
    "time_series_transformer": _series,
}
