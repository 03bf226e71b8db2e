"""Builders of the tiny models on which minilora, PEFT and bitsandbytes are compared, always with equal weights."""

import copy
import functools

import pytest
import torch


@functools.cache
def _original(family: str, intermediate: int, tied: bool):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    if family == "gpt2":
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32, initializer_range=0.2,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
                            tie_word_embeddings=tied)  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(hidden_size=64, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=64, max_position_embeddings=32, initializer_range=0.1,
                             attention_bias=True, mlp_bias=False, bos_token_id=0, eos_token_id=1,
                             tie_word_embeddings=tied)  # fmt: skip
        model = LlamaForCausalLM(config)
    with torch.no_grad():  # biases start at zero and norms at one, where a lost or swapped one would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="session")
def build_model():
    """``build_model("llama" | "gpt2")``: a fresh tiny model in train mode, its biases and norms random too."""

    def build(family: str, dtype: torch.dtype = torch.float32, intermediate: int = 96, tied: bool | None = None):
        tied = family == "gpt2" if tied is None else tied
        return copy.deepcopy(_original(family, intermediate, tied)).to(dtype).train()

    return build


@pytest.fixture(scope="session")
def token_ids():
    """Two rows of twelve tokens of the tiny models' vocabulary."""
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that a second thread is only waited for, for seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
