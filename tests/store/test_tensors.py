"""Every tensor of the base that an adapter does not bring itself is remembered: one that was drawn anew is named when it is loaded."""

import json
import time

import pytest
import torch
from torch import nn

from minilora import LoraConfig, QuantConfig, get_peft_model, inject, load_adapter, quantize_model, save_adapter
from minilora.errors import CheckpointError
from minilora.lora.bare import Bare
from minilora.many.hotswap import hotswap_adapter
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE, read_adapter, seal
from minilora.store.tensors import are_prints, other_tensors, prints

transformers = pytest.importorskip("transformers")
TASK = {"r": 3, "lora_alpha": 12, "task_type": "SEQ_CLS"}


def bert(seed=0, kind=torch.float32, **fields):
    """A classifier on BERT, whose pooler and head are drawn by ``seed``; all else is the same checkpoint's."""
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=70,
        num_labels=3,
        **fields,
    )
    torch.manual_seed(5)
    model = transformers.BertForSequenceClassification(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "pooler" in name or "classifier" in name:
                tensor.normal_(std=0.3)
    return model.to(kind)


def gpt2(make_gpt2, seed, rows=67):
    """Tokens were added: their rows are drawn by ``seed``."""
    model = make_gpt2()
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and "was trained on another base model" in said and "allow_other_base=True" in said
    for word in words:
        assert word in said
    return said


def test_a_pooler_that_is_drawn_anew_is_named(tmp_path):
    """transformers draws it at every load; the head beside it is saved with the adapter."""
    save_adapter(get_peft_model(bert(), LoraConfig(**TASK, target_modules=["query"])), tmp_path)
    load_adapter(bert(), tmp_path)
    said = refused(
        lambda: load_adapter(bert(1), tmp_path), "bert.pooler.dense.weight, bert.pooler.dense.bias hold other values"
    )
    assert "classifier" not in said and "save the base model too" in said
    load_adapter(bert(1), tmp_path, allow_other_base=True)


def test_a_head_that_the_adapter_does_not_bring_is_named(tmp_path):
    save_adapter(inject(bert(), LoraConfig(r=3, lora_alpha=12, target_modules=["query"])), tmp_path)
    other = bert()
    with torch.no_grad():
        other.classifier.weight.normal_()
    refused(lambda: load_adapter(other, tmp_path), "classifier.weight holds other values")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rows_of_new_tokens_are_seen(make_gpt2, tmp_path, kind):
    save_adapter(inject(gpt2(make_gpt2, 1), LoraConfig(r=3, lora_alpha=12, target_modules=["c_attn"])), tmp_path)
    load_adapter(gpt2(make_gpt2, 1).to(kind), tmp_path)
    refused(lambda: load_adapter(gpt2(make_gpt2, 2).to(kind), tmp_path), "transformer.wte.weight holds other values")


def test_rows_that_the_adapter_brings_may_be_others(make_gpt2, tmp_path):
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["c_attn"], trainable_token_indices={"wte": [64, 65, 66]})
    save_adapter(get_peft_model(gpt2(make_gpt2, 1), config), tmp_path)
    load_adapter(gpt2(make_gpt2, 2), tmp_path)
    other = gpt2(make_gpt2, 2)
    other.transformer.wte.weight.data[5] += 1
    refused(lambda: load_adapter(other, tmp_path), "transformer.wte.weight holds other values")


def test_biases_that_the_adapter_brings_may_be_others(make_gpt2, tmp_path):
    save_adapter(inject(make_gpt2(), LoraConfig(r=3, lora_alpha=12, target_modules=["c_attn"], bias="all")), tmp_path)
    other = make_gpt2()
    other.transformer.h[1].mlp.c_fc.bias.data += 1
    load_adapter(other, tmp_path)
    other = make_gpt2()
    other.transformer.wpe.weight.data[7, 3] += 1
    refused(lambda: load_adapter(other, tmp_path), "transformer.wpe.weight holds other values")


KINDS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("after", KINDS, ids=str)
@pytest.mark.parametrize("before", KINDS, ids=str)
def test_in_another_dtype_a_tensor_is_the_same_one(tmp_path, before, after):
    save_adapter(get_peft_model(bert(kind=before), LoraConfig(**TASK, target_modules=["query"])), tmp_path)
    load_adapter(bert(kind=before).to(after), tmp_path)
    refused(lambda: load_adapter(bert(1, kind=after), tmp_path), "bert.pooler.dense.weight")


@pytest.mark.parametrize(
    "how", [QuantConfig(), QuantConfig(double_quant=True), QuantConfig("nf2"), QuantConfig("int8")], ids=str
)
def test_a_packed_tensor_is_the_same_one(tmp_path, how):
    """The pooler is packed too, and may be so at either side."""
    config = LoraConfig(**TASK, target_modules=["query"])
    makers = {
        "dense": bert,
        "packed": lambda seed=0: quantize_model(bert(seed), how, target_modules=["query", "dense"]),
    }
    for name, make in makers.items():
        save_adapter(get_peft_model(make(), config), tmp_path / name)
        for load in makers.values():
            load_adapter(load(), tmp_path / name)
            refused(lambda load=load, name=name: load_adapter(load(1), tmp_path / name), "bert.pooler.dense.")


def test_buffers_that_are_saved_with_a_model_are_a_part_of_it(tmp_path):
    def base(mean=0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 5)).eval()
        model[1].running_mean += mean
        model.register_buffer("scratch", torch.rand(3) + mean, persistent=False)
        return model

    save_adapter(inject(base(), LoraConfig(r=2, lora_alpha=3, target_modules=["0"])), tmp_path)
    load_adapter(base(), tmp_path)
    refused(lambda: load_adapter(base(0.1), tmp_path), "1.running_mean holds other values")


def test_an_exchange_names_it_too(tmp_path):
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["query"])
    save_adapter(get_peft_model(bert(), config), tmp_path)
    hotswap_adapter(get_peft_model(bert(), config), tmp_path)
    refused(lambda: hotswap_adapter(get_peft_model(bert(1), config), tmp_path), "bert.pooler.dense.weight")


def test_a_seal_of_before_still_loads(tmp_path):
    save_adapter(get_peft_model(bert(), LoraConfig(**TASK, target_modules=["query"])), tmp_path)
    base = dict(read_adapter(tmp_path).base)
    assert are_prints(base.pop("tensors"))
    files = {name: (tmp_path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    (tmp_path / SEAL_FILE).write_bytes(seal(files, base)[SEAL_FILE])
    load_adapter(bert(1), tmp_path)


# ---- the prints


def test_one_value_of_every_row_is_hashed_and_the_last_of_all():
    """Whatever the width; and all values of a small tensor."""
    for shape in ((3000, 40), (70_000, 1), (66_000, 2), (5, 30_000), (300, 300), (70_001,), (200, 3, 150)):
        model = nn.Module()
        model.register_parameter("w", nn.Parameter(torch.randn(*shape)))
        said = prints(Bare(model), {})
        assert other_tensors(Bare(model), said) == []
        for row in (0, 1, shape[0] // 2, shape[0] - 2, shape[0] - 1):
            other = nn.Module()
            other.register_parameter("w", nn.Parameter(model.w.detach().clone()))
            other.w.data[row] += 1
            assert other_tensors(Bare(other), said) == ["w"], (shape, row)
        other.w.data.copy_(model.w)
        other.w.data.view(-1)[-1] += 1
        assert other_tensors(Bare(other), said) == ["w"]
    small = nn.Linear(60, 50)
    said = prints(Bare(small), {})
    for at in (1, 1501, 2998):
        other = nn.Linear(60, 50)
        other.load_state_dict(small.state_dict())
        other.weight.data.view(-1)[at] += 1
        assert other_tensors(Bare(other), said) == ["weight"]


def test_tensors_of_every_dtype_and_of_no_size():
    model = nn.Module()
    for kind in (torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.bfloat16):
        model.register_buffer(str(kind).replace(".", "_"), torch.ones(5, 3).to(kind))
    model.register_buffer("none", torch.zeros(0, 4))
    model.register_buffer("one", torch.tensor(2.5))
    said = json.loads(json.dumps(prints(Bare(model), {})))
    assert are_prints(said) and len(said) == 8 and other_tensors(Bare(model), said) == []
    model.one += 1
    model.torch_int64[4, 2] = 7
    assert other_tensors(Bare(model), said) == ["torch_int64", "one"]


@pytest.mark.parametrize(
    "value",
    [
        None, [], {"a": None}, {"a": ["float32 0123456789abcdef "]}, {"a": ["float32 0123456789abcdef 0", []]},
        {"a": ["float32 0123456789abcdeg ", []]}, {"a": ["float32 0123456789abcdef ", [-1]]}, {"a": ["x", []]},
        {"a": ["float32 0123456789abcdef ", [True]]}, {"a": ["float32 0123456789abcdef ", {}]}, {"a": [1, []]},
    ],
)  # fmt: skip
def test_what_is_no_print(value):
    assert not are_prints(value)
    assert are_prints({"a": ["float32 0123456789abcdef ", [3, 4]], "b": ["packed  00000000", []]})


def test_a_large_tensor_costs_little():
    """0.3 s for a gigabyte are allowed."""
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(40_000, 1_600, dtype=torch.bfloat16)))  # 0.128 GB
    prints(Bare(model), {})
    began = time.process_time()
    prints(Bare(model), {})
    assert time.process_time() - began < 0.3 * 0.128
