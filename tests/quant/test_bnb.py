"""Packed models on disk: bitsandbytes' layout both ways, and what a damaged file gets."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

import minilora
from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError, QuantizationError, StateError
from minilora.quant.blockwise import quantize
from minilora.quant.bnb import from_bitsandbytes, to_bitsandbytes
from minilora.quant.config import QuantConfig
from tests.models import gpt2, llama

transformers = pytest.importorskip("transformers")
from minilora.hf.packed import is_packed_folder, load_packed, packed_state_dict, save_packed  # noqa: E402

FORMATS = pytest.mark.parametrize("name", ["nf4", "fp4"])
NESTED = pytest.mark.parametrize("double", [False, True])
STATE = ".quant_state.bitsandbytes__nf4"


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)) * 0.05


@FORMATS
@NESTED
@pytest.mark.parametrize("shape", [(48, 128), (33, 7), (1, 5), (257, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_weight_goes_both_ways(name, double, shape, dtype):
    packed = quantize(weights(*shape).to(dtype), QuantConfig(name, double_quant=double))
    again = from_bitsandbytes(to_bitsandbytes(packed), "w")
    assert again.dtype == dtype and again.shape == packed.shape
    assert torch.equal(again.dequantize(), packed.dequantize()) and again.bits_per_weight == packed.bits_per_weight


@FORMATS
@NESTED
def test_the_tensors_are_bitsandbytes_own(name, double):
    bnb = pytest.importorskip("bitsandbytes")
    dense = weights(48, 128)
    theirs = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type=name, compress_statistics=double).to(
        "cpu"
    )
    state = theirs.quant_state.as_dict(packed=True)
    ours = to_bitsandbytes(quantize(dense, QuantConfig(name, double_quant=double)))
    assert {f".{key}" for key in state} == ours.keys() - {""}
    for key, tensor in state.items():
        if "quant_state" in key:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(ours[f".{key}"].tolist()))
        else:
            assert torch.equal(tensor, ours[f".{key}"])
    assert torch.equal(theirs.data, ours[""])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float16])
def test_other_storage_types_hold_the_same_bytes(storage):
    tensors = to_bitsandbytes(quantize(weights(48, 128), QuantConfig()))
    want = from_bitsandbytes(tensors, "w").dequantize()
    tensors[""] = tensors[""].view(-1).view(storage).unsqueeze(1)
    assert torch.equal(from_bitsandbytes(tensors, "w").dequantize(), want)


def damaged(double, change):
    tensors = to_bitsandbytes(quantize(weights(48, 128), QuantConfig(double_quant=double)))
    state = json.loads(bytes(tensors[STATE].tolist()))
    change(tensors, state)
    if STATE in tensors and tensors[STATE].numel() < 10_000:
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


FAULTS = {
    "codes cut": (
        False,
        lambda t, s: t.update({"": t[""][:-1]}),
        "w: holds 3071 bytes of codes, its quant_state wants 3072",
    ),
    "scales cut": (
        False,
        lambda t, s: t.update({".absmax": t[".absmax"][:-1]}),
        r"w\.absmax: holds 95 scales.*wants 96",
    ),
    "scales gone": (False, lambda t, s: t.pop(".absmax"), r"w\.absmax: is missing"),
    "scale not finite": (False, lambda t, s: t[".absmax"].fill_(float("nan")), r"w\.absmax: holds NaN"),
    "table cut": (False, lambda t, s: t.update({".quant_map": t[".quant_map"][:8]}), r"w\.quant_map: holds 8 levels"),
    "another table": (False, lambda t, s: t[".quant_map"].mul_(0.5), r"w\.quant_map: is not the table of nf4"),
    "no state": (False, lambda t, s: t.pop(STATE), "has 0 quant_state tensors"),
    "two states": (
        False,
        lambda t, s: t.update({".quant_state.bitsandbytes__fp4": t[STATE]}),
        "has 2 quant_state tensors",
    ),
    "long state": (False, lambda t, s: t.update({STATE: torch.zeros(20_000, dtype=torch.uint8)}), "is no quant_state"),
    "huge shape": (False, lambda t, s: s.update(shape=[2**40, 2]), "is not a state that minilora reads"),
    "negative shape": (False, lambda t, s: s.update(shape=[-48, 128]), "is not a state"),
    "four sides": (False, lambda t, s: s.update(shape=[2, 2, 12, 128]), "is not a state"),
    "shape of texts": (False, lambda t, s: s.update(shape=["48", "128"]), "is not a state"),
    "shape true": (False, lambda t, s: s.update(shape=[True, 128]), "is not a state"),
    "another shape": (False, lambda t, s: s.update(shape=[48, 256]), "wants 6144"),
    "blocksize 0": (False, lambda t, s: s.update(blocksize=0), "is not a state"),
    "blocksize 1e9": (False, lambda t, s: s.update(blocksize=10**9), "is not a state"),
    "blocksize text": (False, lambda t, s: s.update(blocksize="64"), "is not a state"),
    "another blocksize": (False, lambda t, s: s.update(blocksize=128), "holds 96 scales"),
    "dtype": (False, lambda t, s: s.update(dtype="float64"), "is not a state"),
    "kind": (False, lambda t, s: s.update(quant_type="fp4"), "is not a state"),
    "no shape": (False, lambda t, s: s.pop("shape"), "is not a state"),
    "nested scales cut": (
        True,
        lambda t, s: t.update({".nested_absmax": t[".nested_absmax"][:0]}),
        "holds 0 scales of scales",
    ),
    "nested scales gone": (True, lambda t, s: t.pop(".nested_absmax"), r"nested_absmax: is missing"),
    "nested not finite": (
        True,
        lambda t, s: t[".nested_absmax"].fill_(float("inf")),
        "nested_absmax: holds NaN or inf",
    ),
    "nested table": (True, lambda t, s: t[".nested_quant_map"].mul_(2), "nested_quant_map: is not"),
    "nested table cut": (
        True,
        lambda t, s: t.update({".nested_quant_map": t[".nested_quant_map"][:9]}),
        "nested_quant_map: is not",
    ),
    "nested blocksize": (True, lambda t, s: s.update(nested_blocksize=64), "is not a state"),
    "nested offset": (True, lambda t, s: s.update(nested_offset=float("nan")), "is not a state"),
    "nested offset gone": (True, lambda t, s: s.pop("nested_offset"), "is not a state"),
    "nested as floats": (True, lambda t, s: t.update({".absmax": t[".absmax"].float()}), "wanted uint8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_weight_is_named(fault):
    double, change, words = FAULTS[fault]
    with pytest.raises(CheckpointError, match=words):
        from_bitsandbytes(damaged(double, change), "w")


def test_formats_that_bitsandbytes_lacks_are_refused():
    for config in (QuantConfig("sf4"), QuantConfig("nf3"), QuantConfig("nf4", blocksize=32)):
        with pytest.raises(QuantizationError, match="it stores nf4 and fp4"):
            to_bitsandbytes(quantize(weights(8, 64), config))


# Whole models


def packed(model, **fields):
    return minilora.quantize_model(model, QuantConfig(**fields))


@pytest.fixture(params=["llama", "tied", "gpt2"])
def make(request):
    def build():
        if request.param == "gpt2":
            return gpt2(n_embd=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # compared in train mode
        return llama(intermediate_size=128, tie_word_embeddings=request.param == "tied")

    return build


@FORMATS
@NESTED
def test_a_packed_model_comes_back(make, name, double, tmp_path, ids):
    model = packed(make(), format=name, double_quant=double, scale="mse")
    save_packed(model, tmp_path)
    again = load_packed(str(tmp_path), torch.float32)
    assert is_packed_folder(str(tmp_path)) and torch.equal(again(ids).logits, model(ids).logits)
    assert again.get_output_embeddings().weight.is_floating_point()
    adapted = minilora.get_peft_model(again, minilora.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    adapted(ids).logits.sum().backward()


@pytest.mark.filterwarnings("ignore")
@NESTED
def test_installed_bitsandbytes_opens_it_with_equal_weights(make, double, tmp_path, ids):
    pytest.importorskip("bitsandbytes")
    model = packed(make(), double_quant=double, scale="mse", signed_scale=True)
    save_packed(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@FORMATS
@NESTED
def test_a_checkpoint_of_bitsandbytes_opens_here(make, name, double, tmp_path, ids):
    pytest.importorskip("bitsandbytes")
    make().save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=config
    ).train()
    theirs.save_pretrained(tmp_path / "packed")
    ours = minilora.hf.load_model(str(tmp_path / "packed"))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_partly_packed_models_are_read_weight_by_weight(make, tmp_path, ids):
    model = make()
    one = next(path for path, module in model.named_modules() if path.endswith(("q_proj", "c_attn")))
    minilora.quantize_model(model, QuantConfig(), [one])
    save_packed(model, tmp_path)
    again = load_packed(str(tmp_path), torch.float32)
    assert sum(isinstance(module, minilora.QuantLinear) for module in again.modules()) == 1
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_job_leaves_a_packed_model_as_it_is(monkeypatch):
    from minilora.job import told
    from minilora.job.settings import Job

    said = []
    model = packed(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 48), "v_proj": torch.nn.Linear(64, 64)}).eval())
    monkeypatch.setattr(told, "is_packed_folder", lambda place: True)
    job = Job("m", "d.jsonl", "out")
    told.say_packed(job, model, said.append)
    assert said == ["m is packed already (nf4), and stays as it is"]
    with pytest.raises(ConfigError, match="quant='nf3': m is packed as nf4 already"):
        told.say_packed(dataclasses.replace(job, quant="nf3"), model, said.append)


def test_what_cannot_be_saved_packed_says_so(make, tmp_path):
    with pytest.raises(StateError, match="no packed layer; call quantize_model"):
        save_packed(make(), tmp_path)
    model = minilora.get_peft_model(packed(make()), minilora.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with pytest.raises(StateError, match="carries adapters"):
        save_packed(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_does_not_fit_is_named(make, tmp_path):
    model = packed(make())
    save_packed(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    norm = next(name for name in tensors if "norm" in name or "ln_1" in name)
    safetensors.torch.save_file({name: t for name, t in tensors.items() if name != norm}, file)
    with pytest.raises(CheckpointError, match=f"{norm} is missing"):
        load_packed(str(tmp_path), torch.float32)
    safetensors.torch.save_file(tensors | {"stray": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="stray is unexpected"):
        load_packed(str(tmp_path), torch.float32)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_packed(str(tmp_path), torch.float32)
    assert len(packed_state_dict(model)) == len(tensors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "sf5"], "sf5"),
        (["--scale", "weighted"], "give --calibration FILE.jsonl"),
        (["--scale", "best"], "scale='best'"),
        (["--blocksize", "48"], "blocksize=48"),
        (["--dtype", "int8"], "--dtype='int8'"),
        (["--calibration", "missing.jsonl", "--scale", "weighted"], "missing.jsonl: no such file"),
    ],
)
def test_the_command_refuses_in_one_line(make, tmp_path, capsys, arguments, words):
    make().save_pretrained(tmp_path / "dense")
    capsys.readouterr()
    assert main(["quantize", "--model", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
