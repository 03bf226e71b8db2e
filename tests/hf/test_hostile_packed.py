"""Packed folders and model folders of somebody who knows the format: refused in one line, soon, or loaded to the right numbers."""

import json
import os
import shutil
import time

import pytest
import torch

from minilora import QuantConfig, quantize_model
from minilora.errors import CheckpointError, MiniLoraError
from minilora.files.parse import parse_tensors, tensor_bytes

pytest.importorskip("transformers")
from minilora.hf import load_model, load_tokenizer
from minilora.hf.load import skeleton
from minilora.hf.packed import save_packed
from minilora.hf.plan import predicted
from minilora.hf.trials import PlanJob

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory):
    """A packed model's folder, with double quantization."""
    place = tmp_path_factory.mktemp("packed") / "model"
    save_packed(quantize_model(load_model(model_folder), QuantConfig("nf4", double_quant=True)), place)
    return place


@pytest.fixture
def place(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "model")
    return tmp_path / "model"


def change(place, edit):
    """``edit(tensors)`` in the folder's weights."""
    file = place / "model.safetensors"
    tensors, metadata = parse_tensors(bytearray(file.read_bytes()), file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    file.write_bytes(tensor_bytes(tensors, metadata))


def refused(place, words="model "):
    began = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(str(place))
    assert time.process_time() - began < 5  # 2 s where nothing else runs
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1_300
    return str(caught.value)


def move(tensors, path):
    """Say that the first packed weight is the one of another path."""
    for name in [name for name in tensors if name.startswith(WEIGHT)]:
        tensors[f"{path}.weight{name.removeprefix(WEIGHT)}"] = tensors.pop(name)


EDITS = {
    "nothing": (lambda t: t.clear(), "is missing"),
    "a bias that the model has not": (
        lambda t: t.update({WEIGHT.replace("weight", "bias"): torch.ones(64)}),
        "bias: is",
    ),
    "a packed embedding": (lambda t: move(t, "model.embed_tokens"), "has a Embedding there"),
    "a packed norm": (lambda t: move(t, "model.norm"), "RMSNorm there"),
    "a packed part": (lambda t: move(t, "model.layers"), "ModuleList there"),
    "a packed stranger": (lambda t: move(t, "x\u00e9" * 1_000), "the model has no such layer"),
    "a packed nobody": (lambda t: move(t, ""), "model "),
    "scales that overflow together": (
        lambda t: (t[f"{WEIGHT}.nested_absmax"].fill_(3e38), offset(t, 3e38)),
        "nested_absmax: holds NaN or infinity",
    ),
    "30,000 packed weights": (
        lambda t: t.update({f"w{at}.weight{STATE}": torch.zeros(0, dtype=torch.uint8) for at in range(30_000)}),
        "is no|is not JSON",
    ),
    "20,000 names without an end": (
        lambda t: t.update({f"{'a.' * 50}{at}": torch.zeros(0) for at in range(20_000)}),
        "is unexpected",
    ),
    "one name of many parts": (
        lambda t: t.update({f"{'a.' * 1_000_000}weight{STATE}": torch.zeros(0, dtype=torch.uint8)}),
        "is no|is not JSON",
    ),
    "another layer's codes": (lambda t: t.update({WEIGHT: t[WEIGHT][:-2]}), "bytes of codes"),
}


def offset(tensors, value):
    name = WEIGHT + STATE
    state = json.loads(bytes(tensors[name].tolist()))
    tensors[name] = torch.tensor(list(json.dumps(state | {"nested_offset": value}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("case", EDITS)
def test_weights_that_lie_are_refused_soon(place, case):
    edit, words = EDITS[case]
    change(place, edit)
    refused(place, words)


def test_a_tensor_in_two_files_is_refused(place):
    shutil.copy(place / "model.safetensors", place / "more.safetensors")
    refused(place, "is in another file of the folder, too")


def test_what_is_untouched_is_loaded(place, model_folder, ids):
    wanted = quantize_model(load_model(model_folder), QuantConfig("nf4", double_quant=True))
    change(place, lambda tensors: None)
    assert torch.equal(load_model(str(place))(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize(
    "said",
    [
        {"bnb_4bit_quant_type": "nf5"}, {"bnb_4bit_quant_type": ["nf4"]}, {"bnb_4bit_quant_type": "\x1b[2J\n" * 2_000},
        {"bnb_4bit_use_double_quant": "yes"}, {"bnb_4bit_use_double_quant": 10**400},
    ],
    ids=lambda said: f"{next(iter(said))} {str(next(iter(said.values())))[:5]!r}",
)  # fmt: skip
def test_a_plan_of_a_folder_that_lies_about_its_packing(place, said):
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] |= said
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says that it is packed as") as caught:
        predicted(PlanJob(str(place), seq=8))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json", "more.txt"]
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "zero"])
def test_a_pipe_or_device_in_a_model_folder_is_not_waited_for(place, name, make):
    (place / name).unlink(missing_ok=True)
    make(place / name)
    for load in (load_model, load_tokenizer, skeleton):
        with pytest.raises(CheckpointError, match=f"{name} in it is a pipe or a device"):
            load(str(place))


HOSTILE = [
    10**400,
    -1,
    0,
    True,
    None,
    1e300,
    float("nan"),
    "x" * 5_000,
    "a\n\x1b[2J\u202e",
    [],
    {},
    [[[]]],
    "../../etc/passwd",
]


@pytest.mark.parametrize(
    "named", ["../model.safetensors", "/etc/hostname", "a/../../b.safetensors", "", 7, None, ["a"]], ids=str
)
def test_an_index_that_names_weights_elsewhere_is_refused(model_folder, tmp_path, named):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder))
    said = str(caught.value)
    assert "model.safetensors.index.json" in said and said.isprintable()


@pytest.mark.slow
def test_every_field_of_a_model_s_config_with_every_hostile_value(place):
    """Loading is refused in one line, or gives a model; what transformers makes of a number that may be meant is its own."""
    original = json.loads((place / "config.json").read_text())
    for key in original:
        for value in HOSTILE:
            (place / "config.json").write_text(json.dumps(original | {key: value}))
            said = ""
            try:
                load_model(str(place))
            except MiniLoraError as error:
                said = str(error)
            assert said == "" or (said.isprintable() and len(said) < 1_300), (key, value)
