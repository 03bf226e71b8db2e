"""``from_pretrained(quantization_config=NF4Config())``: the same layers as ``quantize_model``, saved as bitsandbytes saves them."""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM

import minilora
from minilora.errors import CheckpointError, ConfigError, QuantizationError, StateError, TargetError
from minilora.hf import LoraTrainer, NF4Config, load_model
from minilora.linear.layers import QuantLinear
from tests.models import gpt2, llama

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
    common = {"vocab_size": 80, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        return llama(3, intermediate_size=88, attention_bias=True, **common)
    return gpt2(3, n_embd=64, n_head=4, **common)


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
    code = (
        "import torch, minilora; from minilora.quant.blockwise import quantize\n"
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


def test_what_bitsandbytes_lacks_is_saved_as_our_own(saved, tmp_path):
    packed = load(saved[1], format="nf3", blocksize=32, double_quant=True)
    packed.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["format"], entry["bits"], entry["blocksize"]) == ("minilora", "nf3", 3, 32)
    assert torch.equal(load_model(str(tmp_path))(TOKENS).logits, packed(TOKENS).logits)


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
    with pytest.raises(ConfigError, match="wanted importance="):
        NF4Config(scale="weighted")
    with pytest.raises(ConfigError, match="wanted a list of names"):
        NF4Config(skip_modules="q_proj")
    with pytest.raises(ConfigError, match="format='q4' is not known"):
        NF4Config("q4")
    with pytest.raises(ConfigError, match="wanted a list of module names"):
        NF4Config(skip_modules=[1])
    with pytest.raises(TargetError, match="'nonexistent' is no linear layer"):
        load(saved[1], skip_modules=["nonexistent"])
    with pytest.raises(QuantizationError, match="importance has no entry"):
        load(saved[1], scale="weighted", importance={"elsewhere": torch.ones(64)})


def test_a_transformers_that_casts_before_it_packs_is_refused(saved, monkeypatch):
    monkeypatch.setattr("minilora.hf.quantizer.OLDEST", (99, 3))
    with pytest.raises(
        minilora.errors.MissingPackageError, match=r"needs transformers 99\.3 or newer, found 5.*; run 'pip"
    ):
        load(saved[1])


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
    target = FIRST[kind].rpartition(".")[2]
    model = minilora.get_peft_model(packed, minilora.LoraConfig(r=4, lora_alpha=12, target_modules=[target]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = LoraTrainer(model, settings, train_dataset=data)
    trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    with pytest.raises(StateError, match="carries adapters"):
        minilora.hf.packed.save_packed(model, tmp_path / "no")


def test_copies_and_pickles(saved):
    packed = load(saved[1], double_quant=True)
    wanted = packed(TOKENS).logits
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(TOKENS).logits, wanted)


def test_a_layer_that_the_file_lacks_is_named(saved, tmp_path):
    """Packed bytes that nobody wrote would be weights up to 1e38."""
    kind, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if name not in (FIRST[kind] + ".weight", "lm_head.weight")
    }
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(CheckpointError, match=rf"{re.escape(FIRST[kind])}.weight: is not in the file"):
        load(str(tmp_path))
    assert torch.isfinite(load(str(tmp_path), skip_modules=[FIRST[kind]])(TOKENS).logits).all()


def test_saving_after_a_merge(saved, tmp_path):
    kind, folder = saved
    dense = minilora.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    model = minilora.get_peft_model(load(folder), dense).merge_and_unload()
    wanted = model(TOKENS).logits
    model.save_pretrained(tmp_path / "all")
    assert "quantization_config" not in json.loads((tmp_path / "all" / "config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "all").eval()(TOKENS).logits, wanted)

    some = minilora.LoraConfig(r=4, lora_alpha=12, target_modules=[FIRST[kind]], init_lora_weights=False)
    model = minilora.get_peft_model(load(folder), some).merge_and_unload()
    model.save_pretrained(tmp_path / "some")
    entry = json.loads((tmp_path / "some" / "config.json").read_text())["quantization_config"]
    assert entry["llm_int8_skip_modules"] == sorted([FIRST[kind], "lm_head"])
    pytest.importorskip("bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "some").eval()
    assert torch.equal(theirs.get_submodule(FIRST[kind]).weight, model.get_submodule(FIRST[kind]).weight)
    assert torch.isfinite(theirs(TOKENS).logits).all()


def test_norms_raised_for_training_are_saved_as_they_came(saved, tmp_path):
    model = minilora.prepare_model_for_kbit_training(load(saved[1], torch.bfloat16))
    model.save_pretrained(tmp_path)
    kept = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {value.dtype for name, value in kept.items() if "norm" in name or "ln_" in name} == {torch.bfloat16}
    assert torch.equal(load_model(str(tmp_path), torch.bfloat16)(TOKENS).logits.isfinite(), torch.ones(2, 5, 80).bool())


def test_inference_mode_leaves_nothing_behind(saved):
    """The buffers that products reuse must be writable after it."""
    code = (
        "import torch, minilora\n"
        "layer = torch.nn.Linear(70, 30)\n"
        "with torch.inference_mode():\n"
        "    packed = minilora.quantize_model(torch.nn.Sequential(layer), minilora.QuantConfig(double_quant=True), ['0'])\n"
        "    packed(torch.ones(2, 70))\n"
        "x = torch.ones(2, 70, requires_grad=True)\n"
        "minilora.quantize(torch.randn(9, 64)).dequantize(torch.bfloat16)\n"
        "other = minilora.quantize_model(torch.nn.Sequential(torch.nn.Linear(70, 30)), target_modules=['0'])\n"
        "other(x).sum().backward()\n"
        "assert x.grad.abs().sum() > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
