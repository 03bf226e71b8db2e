"""``from_pretrained(quantization_config=NF4Config())``: the same layers as ``quantize_model``, saved as bitsandbytes saves them."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import minilora
from minilora.errors import ConfigError, QuantizationError, StateError
from minilora.hf import LoraTrainer, NF4Config, load_model
from minilora.layers import QuantLinear

FIRST = {
    "llama": "model.layers.0.self_attn.q_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
}
SAME = [
    {},
    {"double_quant": True},
    {"format": "fp4"},  # blocksize 64: bitsandbytes decodes wrongly on a CPU where a row is shorter than a block
    {"format": "nf3", "blocksize": 128, "scale": "mse"},
    {"format": "int8"},
]


def tiny(kind):
    torch.manual_seed(3)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=80, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=80, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=list(FIRST))
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(folder)
    return request.param, str(folder)


def load(folder, dtype=torch.float32, **fields):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=NF4Config(**fields)).eval()


TOKENS = torch.tensor([[5, 9, 2, 33, 7], [1, 1, 70, 4, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", SAME, ids=str)
def test_equals_quantize_model(saved, fields, dtype):
    _, folder = saved
    got = load(folder, dtype, **fields)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    minilora.quantize_model(wanted, minilora.QuantConfig(**fields))
    ours, theirs = got.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].dtype == theirs[name].dtype
    assert torch.equal(got(TOKENS).logits, wanted(TOKENS).logits)
    assert not any(p.requires_grad for m in got.modules() if isinstance(m, QuantLinear) for p in m.parameters())


def test_the_first_quantization_of_a_process_may_happen_under_meta(saved):
    """Tables are made once; made under ``torch.device("meta")`` they would hold nothing for ever."""
    import subprocess
    import sys

    code = (
        "import torch, minilora; from minilora.quantize import quantize\n"
        "w = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))\n"
        "torch.set_default_dtype(torch.bfloat16)\n"
        "with torch.device('meta'):\n"
        "    inside = [quantize(w, minilora.QuantConfig('nf4', double_quant=d)) for d in (False, True)]\n"
        "torch.set_default_dtype(torch.float32)\n"
        "outside = [quantize(w, minilora.QuantConfig('nf4', double_quant=d)) for d in (False, True)]\n"
        "assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(inside, outside))\n"
        "assert all(a.nbytes == b.nbytes for a, b in zip(inside, outside))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fields", SAME[:3], ids=str)
def test_save_pretrained_is_bitsandbytes_format(saved, fields, tmp_path):
    packed = load(saved[1], **fields)
    packed.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "bitsandbytes" and entry["llm_int8_skip_modules"] == ["lm_head"]

    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path in [path for path, layer in packed.named_modules() if isinstance(layer, QuantLinear)]:
        layer = theirs.get_submodule(path)
        dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(dense, packed.get_submodule(path).quantized().dequantize()), path
        assert torch.equal(layer.bias, packed.get_submodule(path).bias) if layer.bias is not None else True
    assert torch.equal(load_model(str(tmp_path))(TOKENS).logits, packed(TOKENS).logits)


def test_other_formats_are_not_saved_as_something_else(saved, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load(saved[1], format="nf3").save_pretrained(tmp_path)


def test_dequantize_gives_the_dense_model(saved):
    packed = load(saved[1], double_quant=True)
    wanted = packed(TOKENS).logits
    dense = packed.dequantize()
    assert not any(isinstance(layer, QuantLinear) for layer in dense.modules())
    assert not hasattr(dense, "hf_quantizer")
    torch.testing.assert_close(dense(TOKENS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_weighted_scales_while_loading(saved):
    _, folder = saved
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    importance = minilora.calibrate(dense, [TOKENS])
    got = load(folder, scale="weighted", importance=importance)
    minilora.quantize_model(dense, minilora.QuantConfig(scale="weighted"), importance=importance)
    assert torch.equal(got(TOKENS).logits, dense(TOKENS).logits)


def test_skip_modules_stay_dense(saved):
    kind, folder = saved
    packed = load(folder, skip_modules=[FIRST[kind]])
    assert not isinstance(packed.get_submodule(FIRST[kind]), QuantLinear)
    assert sum(isinstance(layer, QuantLinear) for layer in packed.modules()) > 3


def test_bad_fields_are_refused(saved):
    with pytest.raises(ConfigError, match="blocksize=63"):
        NF4Config(blocksize=63)
    with pytest.raises(ConfigError, match="wants importance="):
        NF4Config(scale="weighted")
    with pytest.raises(ConfigError, match="wanted a list of names"):
        NF4Config(skip_modules="q_proj")
    with pytest.raises(QuantizationError, match="importance has no entry"):
        load(saved[1], scale="weighted", importance={"elsewhere": torch.ones(64)})


def test_the_trainer_takes_it_once_it_has_adapters(saved, tmp_path):
    kind, folder = saved
    packed = load(folder)
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.01, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    with pytest.raises(ValueError, match="purely quantized"):
        LoraTrainer(packed, settings, train_dataset=data)
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    target = FIRST[kind].rpartition(".")[2]
    model = minilora.get_peft_model(packed, minilora.LoraConfig(r=4, lora_alpha=12, target_modules=[target]))
    trainer = LoraTrainer(model, settings, train_dataset=data)
    trainer.train()
    changed = [
        name
        for name, value in model.state_dict().items()
        if "lora_" in name and not value.equal(before.get(name, value * 0))
    ]
    assert changed
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    with pytest.raises(StateError, match="carries adapters"):
        minilora.hf.packed.save_packed(model, tmp_path / "no")


def test_copies_and_pickles(saved):
    packed = load(saved[1], double_quant=True)
    wanted = packed(TOKENS).logits
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(TOKENS).logits, wanted)
