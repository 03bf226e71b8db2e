"""Small GGUF files for the tests, written with the ``gguf`` package as llama.cpp's converter writes a model of transformers."""

import torch

from minilora.quant.gguf.formats import FORMATS
from tests.gguf_blocks import gguf_weight
from tests.models import CHATML

CONTROL, OWN, BYTE = 3, 4, 6  # kinds of token
ARCHITECTURES = {
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "olmoe": "OlmoeConfig",
    "phi3": "Phi3Config",
    "qwen2": "Qwen2Config",
    "qwen2moe": "Qwen2MoeConfig",
    "qwen3": "Qwen3Config",
    "qwen3moe": "Qwen3MoeConfig",
    "stablelm": "StableLmConfig",
    "starcoder2": "Starcoder2Config",
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
_OWN = {
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "attn_logit_softcapping": 40.0},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24},
    "llama": {"rms_norm_eps": 0.25, "tie_word_embeddings": False},
    "olmoe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "phi3": {"pad_token_id": 2},
    "qwen2moe": {**_MOE, "shared_expert_intermediate_size": 160},
    "qwen3moe": {**_MOE, "head_dim": 32, "norm_topk_prob": True},
    "qwen3": {"head_dim": 32},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
}
VOCABULARY = 320


def tiny(architecture, seed=0, **fields):
    """A model of transformers of this architecture, with nothing at its default that a file could leave out."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 7000.0}
    if architecture == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    known = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "bos_token_id": 256, "eos_token_id": 257}
    config = getattr(transformers, ARCHITECTURES[architecture])(
        **{**sizes, **known, **_OWN.get(architecture, {}), **fields}
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:  # experts, which a config's draw may leave as they lie in memory
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
            if parameter.dim() == 1:  # biases and norms
                parameter.add_(torch.randn(parameter.shape) * (0.3 if name.endswith("bias") else 0.2))
    return model.eval()


def byte_vocabulary(**changes):
    """Entries of the metadata: a token a byte, a few merges, and ChatML's tokens; numbers are cut as SmolLM2's are."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 9", "8 4", "19 84", "Ġw or", "o r"]
    tokens = [*letters, "<|im_start|>", "<|im_end|>", "<pad>", "<think>", *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<unused{place}>" for place in range(VOCABULARY - len(tokens))]
    kinds = [CONTROL if t in tokens[256:259] else OWN if t == "<think>" else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    } | changes


def pieces_vocabulary(text="the theory of the other weather; then they gather there 1984", **changes):
    """The same of sentencepiece's kind: pieces with scores, learned of a text as its trainer does, and a token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 259, special_tokens=[])
    learned.train_from_iterator([text], trainer)
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    own = sorted((piece for piece in pieces if len(piece) > 1), key=pieces.index)
    own += [piece for piece in pieces if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *own]
    kinds = [2, CONTROL, CONTROL, *[BYTE] * 256, *[1] * len(own)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(own))]
    missing = VOCABULARY - len(tokens)
    tokens += [f"<unused{place}>" for place in range(missing)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds + [5] * missing,
        "tokenizer.ggml.scores": scores + [-1000.0] * missing,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def write_gguf(path, model, kind="F32", embedding="F32", head=None, **changes):
    """The file of a model of transformers; returns its path.

    Args:
        kind: of the weights of linear layers. embedding, head: of these. changes: entries of the metadata with dots written as two
            underscores; None leaves one out, a dictionary called ``vocabulary`` stands for the tokenizer's.
    """
    import gguf

    config = model.config
    called = {"gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    architecture = called.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    entries = {f"{architecture}.{key}": value for key, value in _facts(config).items()}
    entries |= {"general.name": "tiny"} | changes.pop("vocabulary", byte_vocabulary())
    entries |= {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in entries.items():
        if value is not None:
            _add(writer, name, value)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    for target, tensor in model.state_dict().items():
        owner, _, own = target.rpartition(".")
        if owner.endswith(".experts"):
            for name, part in _experts(int(owner.split(".")[2]), own, tensor):
                _add_tensor(writer, name, part, kind)
        elif target not in tied:
            name = f"{names.get_name(owner)}.{own}"
            as_kind = {"token_embd.weight": embedding, "output.weight": head or embedding}.get(name, kind)
            _add_tensor(writer, name, _converted(architecture, name, tensor, config), as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _experts(block, projection, tensor):
    """The converter's tensors of one projection of experts: gates and ups apart."""
    if projection == "down_proj":
        return [(f"blk.{block}.ffn_down_exps.weight", tensor)]
    gate, up = tensor.chunk(2, 1)
    return [(f"blk.{block}.ffn_gate_exps.weight", gate), (f"blk.{block}.ffn_up_exps.weight", up)]


def _facts(config):
    """What the converter says of a model, under its architecture's name."""

    def get(*names):
        return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)

    heads, width = config.num_attention_heads, config.hidden_size
    facts = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "feed_forward_length": get("intermediate_size", "n_inner") or 4 * width,
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "attention.layer_norm_epsilon": get("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    }
    if config.model_type == "gpt2":
        return {key: value for key, value in facts.items() if value is not None and key != "attention.head_count_kv"}
    rope = getattr(config, "rope_parameters", None) or {}
    full = rope.get("full_attention", rope)
    head = get("head_dim") or width // heads
    facts |= {"attention.key_length": head, "attention.value_length": head, "rope.freq_base": full.get("rope_theta")}
    facts["rope.dimension_count"] = int(head * full.get("partial_rotary_factor", 1.0))
    if full.get("rope_type") == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
    if config.model_type.startswith("gemma") or config.model_type == "phi3":
        facts["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma3_text":
        facts["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type == "gemma2":
        facts["attn_logit_softcapping"] = config.attn_logit_softcapping
        facts["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type == "gemma3_text":
        facts["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    if get("num_experts"):
        facts |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        facts["expert_feed_forward_length"] = get("moe_intermediate_size")
        facts["expert_shared_feed_forward_length"] = get("shared_expert_intermediate_size")
    if config.model_type == "stablelm":
        facts["use_parallel_residual"] = config.use_parallel_residual
    return {key: value for key, value in facts.items() if value is not None}


def _converted(architecture, name, tensor, config):
    """As the converter changes the values of a tensor."""
    if architecture == "llama" and any(part in name for part in (".attn_q.", ".attn_k.")):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        return tensor.view(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and name.startswith("blk.") and tensor.dim() == 2:
        return tensor.t()
    return tensor


def _add(writer, name, value):
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _add_tensor(writer, name, tensor, kind):
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if tensor.dim() == 1 or kind == "F32":
        writer.add_tensor(name, tensor.contiguous().numpy())
    elif kind in FORMATS and kind.endswith("_K"):  # gguf does not pack these: any blocks will do
        held = gguf_weight(kind, *tensor.shape, seed=len(name)).packed
        writer.add_tensor(name, held.numpy(), raw_dtype=number)
    else:
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), number), raw_dtype=number)
