"""A tiny model of every architecture that a GGUF is written for: two layers, no square projection where one can be had otherwise."""

import torch

from tests.models import CHATML

VOCABULARY = 288
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_SIZES |= {"initializer_range": 0.15, "bos_token_id": 260, "eos_token_id": 261, "pad_token_id": 262}
_GPT2 = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "initializer_range": 0.15,
}
_GPT2 |= {"bos_token_id": 260, "eos_token_id": 261}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
_GRANITE = {"tie_word_embeddings": False, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
_GRANITE |= {"residual_multiplier": 0.7, "attention_multiplier": 0.2}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}

# Model type of transformers -> what its config has beside the common sizes.
CONFIGS = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "head_dim": 32, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": _GEMMA | {"vocab_size": 263, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "phi3": {"tie_word_embeddings": False, "pad_token_id": 262},
    "phi": {"tie_word_embeddings": False, "num_key_value_heads": 4, "intermediate_size": 256, "partial_rotary_factor": 0.5},
    "starcoder2": {"tie_word_embeddings": True, "use_bias": True, "sliding_window": None},
    "stablelm": {"tie_word_embeddings": False, "partial_rotary_factor": 0.5},
    "olmo2": {"tie_word_embeddings": False},
    "smollm3": {"tie_word_embeddings": True},
    "granite": _GRANITE,
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.25},
    "gpt_neox": {"tie_word_embeddings": False, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False, "parallel_attn": True, "bias": False},
    "qwen2_moe": _MOE | {"tie_word_embeddings": False, "shared_expert_intermediate_size": 160, "norm_topk_prob": False},
    "qwen3_moe": _MOE | {"tie_word_embeddings": False, "head_dim": 32},
    "olmoe": {"num_key_value_heads": 4, "tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def tokenizer(pre=None):
    """Byte-level BPE with four merges, GPT-2's splitting unless ``pre`` is another pre-tokenizer, and a chat template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {text: number for number, text in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = CHATML
    return made


def config(model_type, **fields):
    """The config of a tiny model."""
    from transformers import AutoConfig

    known = _GPT2 if model_type == "gpt2" else _SIZES
    return AutoConfig.for_model(model_type, **{**known, **CONFIGS.get(model_type, {}), **fields})


def model(model_type, seed=0, **fields):
    """The model in fp32 and eval mode; norms and biases are drawn at random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(model_type, **fields), attn_implementation="eager")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
            elif parameter.dim() == 3:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    return made.float().eval().requires_grad_(False)
