"""Settings of every test: no network, two threads, the same examples on every run."""

import os

# Before the first import of transformers or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before the first import of triton, whose decorators read it: the tests of the kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import torch

from tests import compare, models

torch.set_num_threads(1)  # the models are tiny, and two threads collapse where cores are shared

# `pytest --hypothesis-profile=default` searches at random instead.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def make_mlp():
    """``make_mlp(seed)``: a plain torch model with two Linear layers and a Conv1D between them."""
    return models.mlp


@pytest.fixture(scope="session")
def make_gpt2():
    """``make_gpt2(seed, **config fields)``: two layers of width 16, head tied to the embedding."""
    pytest.importorskip("transformers")
    return models.gpt2


@pytest.fixture(scope="session")
def make_llama():
    """``make_llama(seed, **config fields)``: two layers of width 64, no bias, head of its own."""
    pytest.importorskip("transformers")
    return models.llama


@pytest.fixture(scope="session")
def byte_tokenizer():
    """``byte_tokenizer(template, **special tokens)``: one token a byte."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    return models.byte_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_llama, byte_tokenizer):
    """A Llama of two layers and a tokenizer of one token a byte, with a chat template, as transformers saves them."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    tokenizer.save_pretrained(folder)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_llama(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.02, **ends)
    with torch.no_grad():
        for parameter in model.parameters():  # the norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ids():
    """Two rows of eight tokens for ``make_gpt2`` and ``make_llama``."""
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def snapshot():
    """``snapshot(model)``: two of one model are equal exactly if nothing happened to it between them."""
    return compare.snapshot


@pytest.fixture(scope="session")
def randomize():
    """``randomize(module, seed)``: give everything that trains random values; a fresh B of zeros hides too much."""
    return models.randomize
