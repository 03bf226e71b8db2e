"""An adapter on a small Llama, sealed, as all tests of this folder verify it."""

from types import SimpleNamespace

import pytest
import torch

import minilora
from minilora.proof import read_probe, seal_folder
from tests.models import byte_tokenizer, llama, lora, randomize

LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base(seed=0):
    """Seeds differ in the weights alone. The vocabulary is a little larger than the tokenizer's, as it often is."""
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return llama(seed, vocab_size=288, max_position_embeddings=256, **ends)


def adapted(seed=0, layers=LAYERS, size=0.15, **fields):
    """Base 0 with a random adapter, whose update is about as large as what a run learns."""
    model = randomize(minilora.get_peft_model(base(), lora(layers, **{"use_rslora": True, **fields})), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    return model


@pytest.fixture(scope="session")
def sealed(tmp_path_factory):
    """A folder with an adapter and its probe, the model and its tokenizer."""
    folder, model, tokenizer = tmp_path_factory.mktemp("sealed") / "adapter", adapted(), byte_tokenizer()
    model.save_pretrained(folder)
    seal_folder(model, tokenizer, folder, ["hello there"], name="tiny")
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, probe=read_probe(folder))


def answers_along(probe, name, count=20):
    """What a server on this curve would answer: the likeliest tokens, as far as the probe lists them."""
    at = probe.place(name)
    count = min(count, probe.curves[at].listed)
    each = [sorted(zip(q.log_probs[at], q.tokens, strict=True), reverse=True)[:count] for q in probe.questions]
    return [{token: value for value, token in one} for one in each]
