"""The small models, configs and tokenizer that the tests build, each in one place.

None has a square layer where one can be had otherwise, biases are drawn at random because at zero a lost one would not show, and
``lora_alpha`` is not ``r``. What needs transformers imports it when it is called.
"""

from types import SimpleNamespace

import torch
from torch import nn

from minilora import LoraConfig
from minilora.lora.slots import adapters_of
from minilora.peft.layers import LoraLayer

LAYERS = ("first", "mid", "last")  # all linear ones of MLP
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lora(targets=LAYERS, **fields):
    """A config of rank 3 and scaling 4."""
    return LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": targets, **fields})


def randomize(module, seed=0):
    """Give everything that trains random values; a fresh B of zeros hides too much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def adapted_paths(model):
    """Where adapters sit, in the order of the model."""
    return [path for path, module in nn.Module.named_modules(model) if isinstance(module, LoraLayer)]


def standing(model, path):
    """What a call of an adapted place runs: the outermost adapter, or the merged layer. ``get_submodule`` may find PEFT's names for it."""
    return adapters_of(model).slots[path].standing


# ---- without transformers


class Conv1D(nn.Module):
    """GPT-2's layer, weight ``[in, out]``."""

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


class Words(nn.Module):
    """A language model of three layers, with biases: it knows nothing of ``logits_to_keep`` or ``use_cache``."""

    def __init__(self, seed=0, vocabulary=41, width=12, inner=20):
        super().__init__()
        self.embed, self.mid = nn.Embedding(vocabulary, width), nn.Linear(width, inner)
        self.head = nn.Linear(inner, vocabulary)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids).cumsum(1) / 4 * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(torch.tanh(self.mid(hidden))))


def mlp(seed=0):
    """A plain torch model with two Linear layers and a Conv1D between them."""
    torch.manual_seed(seed)
    return finished(MLP())


def finished(model):
    """The model in eval mode, its biases drawn at random."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


# ---- of transformers


def gpt2_config(**fields):
    """Two layers of width 16; the head is tied to the embedding unless ``fields`` say otherwise."""
    from transformers import GPT2Config

    tiny = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 32, "initializer_range": 0.2}
    return GPT2Config(**{**tiny, "bos_token_id": 0, "eos_token_id": 1, **fields})


def llama_config(**fields):
    """Two layers of width 64, no bias, the head its own."""
    from transformers import LlamaConfig

    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.1}
    return LlamaConfig(**{**tiny, "bos_token_id": 0, "eos_token_id": 1, **fields})


def gpt2(seed=0, **fields):
    """The model of ``gpt2_config(**fields)``."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    return finished(GPT2LMHeadModel(gpt2_config(**fields)))


def llama(seed=0, **fields):
    """The model of ``llama_config(**fields)``."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return finished(LlamaForCausalLM(llama_config(**fields)))


def plain_bitsandbytes():
    """bitsandbytes as it computes on any processor.

    On one that multiplies bf16 it packs a layer of 4 bits once more at its first call in eval mode. It fails there where a row is no
    whole number of blocks, or the rows are no multiple of 32.
    """
    import bitsandbytes

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    return bitsandbytes


def byte_tokenizer(template=CHATML, **special):
    """One token a byte, so that what is encoded can be read back exactly, with a chat template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def moe(seed=0, **fields):
    """A small Qwen3-MoE whose experts differ: 5 of them, 2 for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "hidden_size": 24,
        "moe_intermediate_size": 20,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    routing = {"num_experts": 5, "num_experts_per_tok": 2}
    known = (
        sizes
        | routing
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64}
        | fields
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**known))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).eval()
