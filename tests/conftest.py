"""Settings of every test: no network, two threads, the same examples on every run."""

import os

# Before the first import of transformers or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before the first import of triton, whose decorators read it: the tests of the kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import hashlib

import hypothesis
import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # the models are tiny, and two threads collapse where cores are shared

# `pytest --hypothesis-profile=default` searches at random instead.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Conv1D(nn.Module):
    """GPT-2's layer, weight ``[in, out]``, without transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class MLP(nn.Module):
    """12 -> 20 -> 14 -> 5; no layer is square."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(12, 20), nn.LayerNorm(20)
        self.mid, self.last = Conv1D(14, 20), nn.Linear(14, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.mid(torch.tanh(self.norm(self.first(x))))))


def _finished(model):
    """The model in eval mode, its biases drawn at random: at zero, a lost one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def make_mlp():
    """``make_mlp(seed)``: a plain torch model with two Linear layers and a Conv1D between them."""

    def make(seed=0):
        torch.manual_seed(seed)
        return _finished(MLP())

    return make


@pytest.fixture(scope="session")
def make_gpt2():
    """``make_gpt2(seed, **config fields)``: two layers of width 16, head tied to the embedding."""

    def make(seed=0, **fields):
        transformers = pytest.importorskip("transformers")
        tiny = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 32, "initializer_range": 0.2}
        config = transformers.GPT2Config(**{**tiny, "bos_token_id": 0, "eos_token_id": 1, **fields})
        torch.manual_seed(seed)
        return _finished(transformers.GPT2LMHeadModel(config))

    return make


@pytest.fixture(scope="session")
def make_llama():
    """``make_llama(seed, **config fields)``: two layers of width 64, no bias, head of its own."""

    def make(seed=0, **fields):
        transformers = pytest.importorskip("transformers")
        tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        tiny |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.1}
        config = transformers.LlamaConfig(**{**tiny, "bos_token_id": 0, "eos_token_id": 1, **fields})
        torch.manual_seed(seed)
        return _finished(transformers.LlamaForCausalLM(config))

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Llama of two layers and a tokenizer of one token a byte, with a chat template, as transformers saves them."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    width = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.LlamaConfig(
        **width, **ends, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=256
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ids():
    """Two rows of eight tokens for ``make_gpt2`` and ``make_llama``."""
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def snapshot():
    """``snapshot(model)``: its class, every place and what object sits there, what trains, and a hash of every tensor.

    Two snapshots of one model are equal exactly if nothing happened to it between them.
    """

    def digest(tensor):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(tensor.dtype), tuple(tensor.shape), hashlib.sha1(raw.numpy().tobytes()).hexdigest()

    def take(model):
        return {
            "class": type(model),
            "attributes": sorted(model.__dict__),
            "places": [(path, id(m), m.training) for path, m in model.named_modules(remove_duplicate=False)],
            "trains": [(path, id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)],
            "tensors": {key: digest(tensor) for key, tensor in model.state_dict().items()},
        }

    return take


@pytest.fixture(scope="session")
def randomize():
    """``randomize(module, seed)``: give everything that trains random values; a fresh B of zeros hides too much."""

    def fill(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return module

    return fill
