"""Builders of the tiny models on which minilora, PEFT and bitsandbytes are compared, always with equal weights."""

import copy
import functools

import pytest
import torch

from tests.models import gpt2_config, llama_config


@functools.cache
def _original(family: str, intermediate: int, tied: bool):
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    torch.manual_seed(7)
    if family == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(gpt2_config(tie_word_embeddings=tied, **still))
    else:
        fields = {"intermediate_size": intermediate, "attention_bias": True, "tie_word_embeddings": tied}
        model = LlamaForCausalLM(llama_config(**fields))
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
