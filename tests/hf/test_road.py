"""The one road into memory: what ``load_model(quant=...)`` packs while it reads equals, to the bit, loading dense and packing then."""

import copy
import hashlib
import json

import pytest
import safetensors.torch
import torch

from minilora import QuantConfig, quantize_model
from minilora.cli import main
from minilora.errors import CheckpointError, QuantizationError
from minilora.hf import NF4Config, load_model
from minilora.hf.packed import save_packed
from minilora.hf.places import QUANT_CHOICES, packing
from minilora.hf.quantize import quantize_to_folder
from minilora.job.finetune import Job, fine_tune
from minilora.linear.layers import QuantLinear
from minilora.lora.config import LoraConfig
from minilora.training.settings import TrainConfig
from tests.models import gpt2, llama

transformers = pytest.importorskip("transformers")

FORMATS = [name for name in QUANT_CHOICES if name != "none"]
MODELS = {
    "llama": lambda: llama(3, intermediate_size=88, attention_bias=True),  # 88: no whole number of blocks in a row
    "tied head": lambda: llama(4, tie_word_embeddings=True),
    "Conv1D": lambda: gpt2(3, n_embd=24, n_head=4),
}


def small(kind, **fields):
    """A model of another kind, as its config class makes it small."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
OTHERS = {  # experts that are merged while they are read, projections that are one, a head of another name, biases
    "mixtral": SIZES | {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": SIZES
    | {"num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 40},
    "phi3": SIZES | {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": SIZES,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(model, dtype, shards)``: a folder of it; ``shards`` are bytes of a file, above which there is an index."""

    def save(model, dtype=torch.float32, **options):
        folder = tmp_path_factory.mktemp("model")
        copy.deepcopy(model).to(dtype).save_pretrained(folder, **options)
        return str(folder)

    return save


def packed_then(folder, quant, dtype=torch.float32):
    """The road as it was: the dense model, and then the packed one beside it."""
    return quantize_model(load_model(folder, dtype), quant)


def assert_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype and torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_format_packs_to_the_same_bytes(saved, kind, name, double):
    folder, quant = saved(MODELS[kind]()), packing(name, double)
    ours, theirs = load_model(folder, quant=quant), packed_then(folder, quant)
    assert_equal(ours, theirs)
    assert type(ours) is type(theirs) and ours.config.to_dict() == theirs.config.to_dict()
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) is (kind != "llama")
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_is_rounded_before_it_is_packed(saved, stored, wanted):
    folder, quant = saved(MODELS["llama"](), stored), packing("nf4", True)
    assert_equal(load_model(folder, wanted, quant=quant), packed_then(folder, quant, wanted))


@pytest.mark.parametrize("quant", [None, packing("nf4", True)], ids=["dense", "nf4"])
def test_several_files_and_their_index(saved, quant):
    folder = saved(MODELS["llama"](), max_shard_size="60KB")
    whole = saved(MODELS["llama"]())
    with open(f"{folder}/model.safetensors.index.json") as file:
        assert len(set(json.load(file)["weight_map"].values())) > 2
    assert_equal(load_model(folder, quant=quant), load_model(whole, quant=quant))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(saved, kind):
    folder, quant = saved(small(kind, **OTHERS[kind])), packing("nf4", True)
    ours, theirs = load_model(folder, quant=quant), packed_then(folder, quant)
    assert_equal(ours, theirs)
    assert sum(isinstance(layer, QuantLinear) for layer in ours.modules()) > 3


def spiky(model):
    """One scale far above those around it, so that they are not packed to 8 bits themselves."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 7] = 900.0
    return model


def test_a_layer_whose_scales_stay_in_fp32(saved):
    folder, quant = saved(spiky(MODELS["llama"]())), packing("nf4", True)
    with pytest.warns(UserWarning, match="the scales of this tensor stay in fp32"):
        ours = load_model(folder, quant=quant)
    with pytest.warns(UserWarning, match="the scales of this tensor stay in fp32"):
        theirs = packed_then(folder, quant)
    layer = ours.model.layers[1].mlp.down_proj
    assert (layer.double_quant, layer.nested_absmax) == (False, None) and ours.model.layers[
        0
    ].mlp.down_proj.double_quant
    assert_equal(ours, theirs)
    ids = torch.arange(2, 9).view(1, -1)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    with pytest.warns(UserWarning, match="stay in fp32"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=NF4Config(double_quant=True)
        )
    assert torch.equal(theirs.eval()(ids).logits, ours(ids).logits)


# ---- what is refused, by name, in one line


def changed(folder, edit):
    file = f"{folder}/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return folder


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(saved, value):
    folder = changed(saved(MODELS["llama"]()), lambda tensors: tensors[NAME][3, 5].fill_(value))
    with pytest.raises(QuantizationError, match=f"^{NAME} holds NaN or infinity") as caught:
        load_model(folder, quant=packing("nf4", True))
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_shape_is_named(saved):
    """The packed bytes of a weight say nothing of its shape, and transformers does not ask for that of a packed one."""
    folder = changed(saved(MODELS["llama"]()), lambda tensors: tensors.update({NAME: torch.ones(64, 88)}))
    with pytest.raises(CheckpointError, match=rf"^model .*: {NAME}: is \[64, 88\], the model wants \[88, 64\]"):
        load_model(folder, quant=packing("nf4", True))


def test_a_weight_that_is_missing_is_named(saved):
    folder = changed(saved(MODELS["llama"]()), lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=f"^{NAME}: is not in the file"):
        load_model(folder, quant=packing("nf4", True))


def test_a_model_that_another_library_packed_is_refused(saved, capsys, byte_tokenizer):
    folder = saved(MODELS["llama"]())
    byte_tokenizer().save_pretrained(folder)
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, file)
    capsys.readouterr()
    assert main(["generate", "--model", folder, "--quant", "nf4", "hi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert folder in line


# ---- packed folders


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_folder_comes_back_as_it_went(saved, tmp_path, kind, double, dtype):
    model = packed_then(saved(MODELS[kind]()), packing("nf4", double))
    save_packed(model, tmp_path / "packed")
    again = load_model(str(tmp_path / "packed"), dtype)
    assert_equal(again, copy.deepcopy(model).to(dtype))
    for path, layer in again.named_modules():
        if isinstance(layer, QuantLinear):  # no part holds on to the memory of a whole file
            held = layer.codes.untyped_storage().nbytes()
            assert held == layer.codes.numel(), path


def test_quantize_writes_the_same_folder(saved, tmp_path, byte_tokenizer):
    folder = saved(MODELS["llama"]())
    byte_tokenizer().save_pretrained(folder)
    quant = QuantConfig("nf4", double_quant=True)
    quantize_to_folder(folder, str(tmp_path / "ours"), quant)
    save_packed(packed_then(folder, quant), tmp_path / "theirs")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_what_is_packed_is_not_quantized_again(saved, tmp_path, capsys):
    save_packed(packed_then(saved(MODELS["llama"]()), packing("nf4", True)), tmp_path / "packed")
    assert main(["quantize", "--model", str(tmp_path / "packed"), "--out", str(tmp_path / "out")]) == 2
    assert "is packed already" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- the result of a run


@pytest.mark.parametrize("quant", ["nf4", "nf3", "none"])
def test_a_run_ends_on_the_same_adapter_as_by_the_old_road(model_folder, tmp_path, monkeypatch, quant):
    from minilora.job import loading

    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"a{n}", "completion": "bc" * n}) + "\n" for n in range(1, 8)))
    lora = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    training = TrainConfig(steps=4, batch_size=2, lr=0.01, seed=5)

    def sha(name):
        job = Job(
            model_folder, str(data), str(tmp_path / name), quant=quant, dtype="float32", lora=lora, training=training
        )
        fine_tune(job, lambda line: None)
        return hashlib.sha256((tmp_path / name / "adapter_model.safetensors").read_bytes()).hexdigest()

    new = sha("new")

    def old_road(name, dtype, trust, *, quant, **options):
        model = load_model(name, dtype, trust)
        return quantize_model(model, quant) if quant else model

    monkeypatch.setattr(loading, "load_model", old_road)
    assert sha("old") == new
