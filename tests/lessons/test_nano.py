"""``lessons/nano.py`` computes what minilora computes: the same bytes, examples and losses, and an adapter that opens everywhere."""

import ast
import copy
import importlib.util
import json
import sys
from pathlib import Path

import peft
import pytest
import torch

from minilora import LoraConfig, inject, load_adapter
from minilora.data.encoding import Encoded, encode
from minilora.demo import DATA
from minilora.lora.slots import adapters_of
from minilora.qlora.quantize_model import quantize_model
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.training.loop import train
from minilora.training.settings import TrainConfig
from tests import models

FILE = Path(__file__).resolve().parents[2] / "lessons" / "nano.py"
R, ALPHA = 3, 12
spec = importlib.util.spec_from_file_location("nano", FILE)
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)


def model_of(seed=0):
    fields = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = models.llama(seed, vocab_size=300, max_position_embeddings=128, attention_bias=True, **fields)
    return model.requires_grad_(False)


def records():
    return [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]


def test_it_is_short_and_stands_alone():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    found = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} - sys.stdlib_module_names == {
        "torch",
        "safetensors",
        "transformers",
    }


@pytest.mark.parametrize("shape", [(64, 96), (33, 64), (7, 192), (640, 128)])
def test_codes_and_scales_to_the_bit(shape):
    torch.manual_seed(1)
    weight = torch.randn(shape) * 0.03
    flat = weight.view(-1)
    flat[:64] = 0.0
    flat[64:128] = (nano.NF4[1:] + nano.NF4[:-1]).div(2).repeat(5)[:64]  # ties
    flat[127] = 1.0
    ours, stored = quantize(weight, QuantConfig(double_quant=True)), nano.quantize(weight)
    assert torch.equal(ours.packed.flatten(), stored["packed"])
    assert torch.equal(ours.absmax, stored["scales"]) and torch.equal(ours.nested_absmax, stored["largest"])
    assert torch.equal(ours.nested_offset, stored["offset"].view(1))
    assert torch.equal(ours.dequantize(torch.float32), nano.dequantize(stored))


@pytest.mark.parametrize(
    "weight", [torch.zeros(64, 64), torch.ones(64, 64), torch.randn(8, 8)], ids=["zeros", "ones", "one block"]
)
def test_scales_that_are_all_equal(weight):
    ours, stored = quantize(weight, QuantConfig(double_quant=True)), nano.quantize(weight)
    assert torch.equal(ours.absmax, stored["scales"]) and torch.equal(
        ours.dequantize(torch.float32), nano.dequantize(stored)
    )


@pytest.mark.parametrize("most", [60, 1000])
def test_the_same_examples(most):
    tokenizer = models.byte_tokenizer()
    for messages in [*records(), [{"role": "system", "content": "Be short."}, *records()[0], *records()[1]]]:
        ids, labels = nano.encode(messages, tokenizer, most)
        ours = encode({"messages": messages}, tokenizer, most)
        assert (tuple(ids), tuple(labels)) == (ours.input_ids, ours.labels)


def both():
    """The same model with the same adapters, as nano makes it, and as minilora does."""
    theirs, ours = model_of(), model_of()
    torch.manual_seed(3)
    adapters = nano.adapt(theirs, R, ALPHA)
    quantize_model(ours, QuantConfig(double_quant=True))
    inject(ours, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    own = adapters_of(ours).named("default")
    assert own.keys() == adapters.keys()
    with torch.no_grad():
        for path, adapter in own.items():
            adapter.lora_A.copy_(adapters[path].lora_A)
    return theirs, adapters, ours


def test_the_same_losses_and_gradients(tmp_path, capsys):
    theirs, _, ours = both()
    tokenizer = models.byte_tokenizer()
    examples = [nano.encode(messages, tokenizer, 100) for messages in records()]
    losses = nano.train(theirs, examples, 0, steps=5, lr=1e-2)
    config = TrainConfig(steps=5, lr=1e-2, batch_size=4, seed=0, pack="off")
    log = train(
        ours, [Encoded(tuple(i), tuple(k)) for i, k in examples], config, tmp_path / "run", 0, say=lambda line: None
    )
    found = [record["loss"] for record in log if "loss" in record]
    assert losses == pytest.approx(found, abs=1e-5) and losses[-1] < losses[0] - 0.05
    assert capsys.readouterr().out.count("step ") == 5


def test_its_adapter_opens_in_minilora_and_in_peft(tmp_path):
    model, adapters, _ = both()
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.1)
    nano.save(adapters, tmp_path / "adapter", R, ALPHA)
    ids = torch.arange(24).view(2, 12)
    want = model(ids, use_cache=False).logits
    packed = quantize_model(model_of(), QuantConfig(double_quant=True))
    load_adapter(packed, tmp_path / "adapter")
    assert torch.allclose(packed(ids, use_cache=False).logits, want, atol=1e-5)
    dense = model_of()  # PEFT: on the weights that the 4 bits stand for
    with torch.no_grad():
        for path, adapter in adapters.items():
            dense.get_submodule(path).weight.copy_(nano.dequantize(adapter.base_layer.stored))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "adapter")
    assert torch.allclose(loaded(ids, use_cache=False).logits, want, atol=1e-5)
