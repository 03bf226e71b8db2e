"""Default LoRA target modules by model type, used when ``LoraConfig.target_modules`` is None.

``DEFAULT_TARGETS`` maps ``model.config.model_type`` of a transformers model to the names of the linear layers that get
an adapter. A tuple lists dotted suffixes: a module is a target when its dotted name equals an entry or ends with
``"." + entry``. A str is one regular expression that has to match the whole dotted name.

The rule: the query and value projections of every attention block (Hu et al. 2021, section 7.1, find this pair the best
use of a small parameter budget), or the fused projection where one matrix makes query, key and value. A model with
several kinds of attention lists the names of each. A suffix cannot tell the towers of one model apart; comments say
which towers a row reaches.

The rows of ``PEFT_ROWS`` are equal to PEFT 0.21.2's own defaults, those that depart from the rule included, so that a
config without targets means the same model in both libraries. ``ADDED_ROWS`` holds architectures that PEFT 0.21.2
lacks, with the module names of transformers 5.24. ``tests/parity/test_architectures.py`` compares the first block with
the installed PEFT, and looks up the names of both blocks in models built by the installed transformers.

Left out on purpose: WavLM, whose attention reads ``q_proj.weight`` without calling the module, so that an adapter there
has no effect; Zamba, whose layers share their attention; XLNet, whose projections are bare parameters.
"""

Targets = tuple[str, ...] | str

# In both blocks a key holds targets, its value the model types that use them, separated by blanks.

PEFT_ROWS: dict[Targets, str] = {
    ("q_proj", "v_proj"): """
        bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm""",
    ("q", "v"): "mt5 t5",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_key_value",): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt",
    ("qkv_proj",): "codegen",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    # The language model is OPT (q_proj, v_proj) or T5 (q, v): one half of the names is always absent.
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("c_proj", "c_attn"): "btlm",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
}

_CAUSAL_LM = """
    afmoe apertus arcee biogpt cohere cohere2 cohere2_moe cwm diffllama doge dots1 ernie4_5 ernie4_5_moe exaone
    exaone4 exaone_moe flex_olmo gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 laguna lfm2 lfm2_moe llama4_text mellum mimo_v2_flash minimax_m2 ministral
    ministral3 modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe phimoe qwen2_moe qwen3_moe sarvam_moe
    seed_oss smollm3 solar_open starcoder2 vaultgemma xglm """
# Attention next to state-space or recurrent layers, which are left alone, as in PEFT's row for nemotron_h. The linear
# attention of olmo_hybrid has the same names and is adapted.
_HYBRID_LM = "bamba falcon_h1 granitemoehybrid jamba olmo_hybrid recurrent_gemma "
_ENCODER_DECODER = """
    blenderbot blenderbot-small fsmt m2m_100 marian mbart mvp nllb-moe pegasus pegasus_x plbart t5gemma trocr """
_TEXT_ENCODER = "esmc eurobert gte jina_embeddings_v3 nomic_bert "
_VISION_ENCODER = """
    beit clip_vision_model deit dinov2 dinov2_with_registers dinov3_vit ijepa pixtral segformer siglip2_vision_model
    siglip_vision_model swin vit vit_mae vit_msn vivit """
# Both towers are adapted.
_TEXT_AND_VISION = "clip clip_text_model clipseg groupvit metaclip_2 owlv2 owlvit siglip siglip2 "
# Of musicgen the decoder alone is adapted, of seamless_m4t the text half (the speech encoder has linear_q, linear_v).
_SOUND = """
    audio-spectrogram-transformer data2vec-audio hubert moonshine musicgen parakeet_ctc seamless_m4t seamless_m4t_v2
    sew speech_to_text speecht5 unispeech unispeech-sat wav2vec2 whisper """
# There is no tower, or its names differ: the language model alone is adapted. (instructblip on T5 needs ("q", "v").)
_MULTIMODAL_LM_ALONE = """
    chameleon emu3 ernie4_5_vl_moe exaone4_5 florence2 gemma4_unified glm46v glm4v glm4v_moe glm_ocr got_ocr2
    granite_speech instructblip qwen2_5_vl qwen2_5_vl_text qwen2_vl qwen2_vl_text qwen3_vl qwen3_vl_moe
    qwen3_vl_moe_text qwen3_vl_text """
# The vision or audio tower, and here and there the connector, has the same names and is adapted too.
_MULTIMODAL_WITH_TOWER = """
    aria audioflamingo3 aya_vision cohere2_vision deepseek_vl gemma3 gemma3n idefics idefics2 idefics3 internvl
    janus kosmos-2 llava llava_next llava_next_video llava_onevision mistral3 mllama ovis2 paddleocr_vl paligemma
    qwen2_5_omni_thinker qwen2_audio qwen3_omni_moe_thinker smolvlm t5gemma2 video_llava vipllava voxtral """

ADDED_ROWS: dict[Targets, str] = {
    ("q_proj", "v_proj"): _CAUSAL_LM
    + _HYBRID_LM
    + _ENCODER_DECODER
    + _TEXT_ENCODER
    + _VISION_ENCODER
    + _TEXT_AND_VISION
    + _SOUND
    + _MULTIMODAL_LM_ALONE
    + _MULTIMODAL_WITH_TOWER,
    # Text encoders first, then images and sound. Of blip and git the text model alone is adapted.
    ("query", "value"): """
        albert bert-generation big_bird camembert canine convbert data2vec-text dpr ernie esm layoutlmv3 lilt
        longformer luke markuplm megatron-bert mobilebert nystromformer rembert roberta-prelayernorm roc_bert
        roformer splinter tapas xlm-roberta-xl xmod
        align blip clap data2vec-vision donut-swin dpt git mobilevit pix2struct pvt swinv2 videomae vilt visual_bert
        vjepa2 yolos""",
    # query and value in the encoder (bigbird_pegasus, led) or the text tower, q_proj and v_proj in the other half.
    ("query", "value", "q_proj", "v_proj"): "altclip bigbird_pegasus chinese_clip led",
    ("q", "v"): "longt5 mpnet pop2piano switch_transformers udop umt5 xlstm",
    ("q_lin", "v_lin"): "distilbert flaubert xlm",
    ("query_proj", "value_proj"): "prophetnet sew-d",
    ("linear_q", "linear_v"): "wav2vec2-bert wav2vec2-conformer",
    ("projection_query", "projection_value"): "cvt",
    ("Wq", "Wv"): "ctrl",
    # One matrix for query, key and value. Of fuyu, modernvbert and phi4_multimodal the language model alone is adapted.
    ("qkv_proj",): "phi3 phi4_multimodal",
    ("query_key_value",): "fuyu gpt_neox_japanese persimmon",
    ("Wqkv",): "dbrx modernbert modernvbert",
    ("c_attn",): "decision_transformer imagegpt openai-gpt",
    ("att_proj",): "bark",
    ("qkv",): "hiera vitdet",
    ("qkv", "q_proj", "v_proj"): "sam sam2 sam_hq",  # image encoder; mask decoder
    ("kv_proj",): "jetmoe",  # the queries belong to the experts
    # Multi-head latent attention: the matrices that make the heads' queries, and their keys and values, from the latent
    # vectors. With ``q_lora_rank=None`` (DeepSeek-V2-Lite) the query is one "q_proj", as in sarvam_mla.
    ("q_b_proj", "kv_b_proj"): """
        deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k25 longcat_flash minicpm3 mistral4
        youtu""",
    ("q_proj", "kv_b_proj"): "sarvam_mla",
    # Most layers are linear attention, the rest softmax attention: both are adapted.
    ("q_proj", "v_proj", "in_proj_qkvz"): "qwen3_next",
    ("q_proj", "v_proj", "in_proj_qkv"): "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text",
    ("q_proj", "v_proj", "qkv_proj"): "minimax",
    ("q_proj", "v_proj", "kv_b_proj"): "kimi_linear",
    # No attention: the one projection that the fused state-space kernels do not bypass.
    ("in_proj",): "falcon_mamba mamba mamba2",
}

DEFAULT_TARGETS: dict[str, Targets] = {
    model_type: targets
    for rows in (PEFT_ROWS, ADDED_ROWS)
    for targets, model_types in rows.items()
    for model_type in model_types.split()
}

# Layers whose weight is read by the module around them, which does not call them: ending of that module's class name to names in it.
# "all-linear" leaves them out; one that is named gets its adapter, and works through ``Adapter.weight``.
READ_BY_PARENT: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("dt_proj",),  # mamba, falcon_mamba, jamba: time_step = dt_proj.weight @ ...
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MHAttentionMap": ("k_linear", "k_proj"),  # detr and its kin, for segmentation
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "LongcatFlashTopkRouter": ("classifier",),
}
