"""What a hostile adapter, packed weight or model folder may do: be refused in one line, soon, before memory is taken."""

import json
import time

import pytest
import torch
from torch import nn

from minilora import LoraConfig, QuantConfig, inject, load_adapter, quantize, save_adapter
from minilora.errors import CheckpointError, ConfigError, MiniLoraError, StateError
from minilora.quant.bnb import from_bitsandbytes, to_bitsandbytes

STATE = ".quant_state.bitsandbytes__nf4"


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))


@pytest.fixture
def folder(tmp_path):
    """An adapter of another program: no seal, so that nothing but the reader stands between its bytes and the model."""
    model = inject(plain(), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    save_adapter(model, tmp_path)
    (tmp_path / "minilora.json").unlink()
    return tmp_path


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, words, kind=MiniLoraError):
    with pytest.raises(kind, match=words) as caught:
        load_adapter(plain(), folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1210
    return str(caught.value)


MANY = [f"m{number}" for number in range(70_000)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict.fromkeys(MANY, 1), "70,000 keys that no adapter's config has"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**6}}, "loftq_iter=1000000"),
        ({"init_lora_weights": "pissa_niter_" + "9" * 5000}, "init_lora_weights="),
        ({"rank_pattern": dict.fromkeys(MANY, 3)}, "rank_pattern: 70,000 keys; at most 65,536"),
        ({"alpha_pattern": dict.fromkeys(MANY, 3)}, "alpha_pattern: 70,000 keys"),
        ({"target_modules": MANY}, "matches nothing"),
        ({"lora_alpha": 10**400}, "lora_alpha="),
        ({"r": "x" * 100_000}, "r='xxx"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_of_any_size_is_refused_soon(folder, fields, words):
    edit(folder, **fields)
    began = time.process_time()
    refused(folder, words)
    assert time.process_time() - began < 4  # 2 s where nothing else runs


def header(folder, entries, data=b""):
    raw = json.dumps(entries).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [2**40, 0, 2**40], [2**32, 2**32], [0] * 17], ids=str)
def test_a_shape_that_no_tensor_has_is_refused(folder, shape):
    header(folder, {"base_model.model.0.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    refused(folder, "damaged safetensors file", CheckpointError)


@pytest.mark.parametrize("name", ["a\x00b", "a\u202eb", "a\nb", "\x1b[2Jx"])
def test_what_no_reader_takes_is_not_written(tmp_path, name):
    model = nn.Module()
    model.add_module(name, nn.Linear(6, 10))
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=[name]))
    with pytest.raises(StateError, match="cannot be printed; rename the module") as caught:
        save_adapter(model, tmp_path / "new")
    assert str(caught.value).isprintable() and not (tmp_path / "new").exists()


def test_an_error_shows_no_escape_sequence(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_adapter(plain(), tmp_path / "\x1b]0;owned\x07\u202e\nminilora: all is well")
    assert str(caught.value).isprintable() and r"\x1b]0;owned\x07\u202e\nminilora" in str(caught.value)


# ---- packed weights


def packed():
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(4)) * 0.05
    tensors = to_bitsandbytes(quantize(weight, QuantConfig("nf4", double_quant=True)))
    return tensors, json.loads(bytes(tensors[STATE].tolist()))


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocksize", 65), ("blocksize", True), ("blocksize", 2**40), ("nested_offset", 1e300), ("nested_offset", 10**400),
        ("nested_offset", True), ("nested_offset", None), ("nested_dtype", "float16"), ("nested_blocksize", 256.0),
        ("nested_blocksize", True), ("shape", [True, 6144]), ("shape", [2**40, 0]), ("shape", {"0": 48}), ("dtype", ["float32"]),
        ("quant_type", "fp4"),
    ],
)  # fmt: skip
def test_a_state_that_means_something_else_is_refused(field, value):
    tensors, state = packed()
    tensors[STATE] = as_bytes(json.dumps(state | {field: value}))
    with pytest.raises(CheckpointError, match=r"w\.quant_state"):
        from_bitsandbytes(tensors, "w")


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", "[" * 5000, '{"a":' * 1500, "1" * 5000, '{"blocksize":64,"blocksize":32}']
)
def test_a_state_that_is_no_object_is_refused(text):
    tensors, _ = packed()
    tensors[STATE] = as_bytes(text)
    with pytest.raises(CheckpointError, match=r"w\.quant_state"):
        from_bitsandbytes(tensors, "w")


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("", torch.int64),
        ("", torch.bool),
        (".absmax", torch.float32),
        (".absmax", torch.int8),
        (".nested_absmax", torch.int32),
    ],
)
def test_a_tensor_of_another_dtype_is_refused(suffix, dtype):
    tensors, _ = packed()
    tensors[suffix] = tensors[suffix].to(dtype)
    with pytest.raises(CheckpointError, match=f"w{suffix}: is {dtype}; wanted"):
        from_bitsandbytes(tensors, "w")


# ---- folders of models


@pytest.fixture
def copy_of(model_folder, tmp_path):
    """``copy_of(**changes of config.json)``: a model folder of one's own."""
    pytest.importorskip("transformers")
    import shutil

    def make(**changes):
        place = tmp_path / "model"
        shutil.copytree(model_folder, place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changes))
        return place

    return make


def test_code_of_a_folder_is_not_run_and_nobody_is_asked(copy_of, monkeypatch):
    from minilora.hf import load_model, load_tokenizer

    place = copy_of(
        model_type="stranger",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]},
    )
    (place / "code.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    load_tokenizer(str(place))  # a tokenizer that transformers knows lies there, and is taken
    with pytest.raises(CheckpointError, match="model "):
        load_model(str(place))
    assert not (place / "ran").exists()


def test_a_pickle_is_not_read(copy_of):
    from minilora.hf import load_model

    place = copy_of()
    (place / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, place / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model "):
        load_model(str(place))


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_given_as_a_model_is_named_and_handed_to_nobody(copy_of, beside):
    from minilora.hf import load_model, load_tokenizer

    place = copy_of()
    if not beside:
        (place / "config.json").unlink()
    (place / "adapter_config.json").write_text("{}")
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="holds an adapter"):
            load(str(place))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("hidden_act", "../../etc/passwd"), ("num_attention_heads", -1), ("head_dim", 0)],
)
def test_a_config_that_cannot_be_built_is_one_line(copy_of, field, value):
    from minilora.hf import load_model
    from minilora.hf.load import skeleton

    place = copy_of(**{field: value})
    for load in (load_model, skeleton):
        with pytest.raises(CheckpointError, match="model ") as caught:
            load(str(place))
        assert str(caught.value).isprintable()


def test_config_errors_too_are_one_line():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=4, lora_alpha=8, init_lora_weights="a\nb\x1b")
    assert str(caught.value).isprintable()
