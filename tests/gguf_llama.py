"""A small Llama and its LoRA as GGUF files for a llama.cpp server, written by the ``gguf`` package: the tests' own, beside minilora's."""

import numpy as np


def write_model(model, tokenizer, path, kind="F32", template=None):
    """The model as a GGUF file whose matrices are ``kind`` (F32, F16, Q8_0, Q4_0 ...); ``template`` instead of the tokenizer's own."""
    import gguf
    from gguf.quants import quantize

    config, packing = model.config, getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = [word in tokenizer.all_special_tokens for word in words]
    rest = [f"<unused{number}>" for number in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words + rest)
    writer.add_token_types([3 if odd else 1 for odd in [*special, *(True for _ in rest)]])
    writer.add_token_merges(["\u0120 t"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template or tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        weight, name = _turned(key, tensor.numpy(), config), names.get_name(key, try_suffixes=(".weight",))
        if weight.ndim == 2 and kind != "F32":
            writer.add_tensor(name, quantize(weight, packing), raw_dtype=packing)
        else:
            writer.add_tensor(name, weight)
    _close(writer)


def write_lora(factors, config, path, factor=lambda path: 1.0):
    """Factors by path (``export/factors.py``) as a GGUF LoRA; each B times ``factor(path)``, and none of a layer where that is 0."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # the factors have their scale
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for layer, own in factors.items():
        if factor(layer):
            name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            writer.add_tensor(f"{name}.lora_a", own.A.numpy())
            writer.add_tensor(
                f"{name}.lora_b", _turned(f"{layer}.weight", own.B.numpy() * np.float32(factor(layer)), config)
            )
    _close(writer)


def _turned(key, weight, config):
    """Rows of q and k in the order in which llama.cpp turns them: a pair is two neighbours, not two halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads:
        weight = weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    return np.ascontiguousarray(weight)


def _close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
