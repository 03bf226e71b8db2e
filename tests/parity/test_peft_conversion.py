"""Adapters with a start of their own, converted to plain LoRA: as PEFT converts them, and read by PEFT."""

import json
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file

import minilora
import minilora.peft
from tests.compare import close
from tests.models import randomize

IDS = torch.tensor([[5, 9, 33, 2, 60, 1]])
SOME = ["q_proj", "down_proj"]
FIELDS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora patterns": {
        "init_lora_weights": "olora",
        "rank_pattern": {"layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"q_proj": 5},
    },
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True},
}
# PEFT asks transformers for the old name of this property, also where a test turns warnings into errors.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("`is_gradient_checkpointing` is deprecated", "(PiSSA|OLoRA) changes the base weights")
]


def ours(build_model, fields, **more):
    config = minilora.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": SOME} | fields)
    return minilora.get_peft_model(build_model("llama", **more).eval(), config)


def saved(model, folder):
    """Start, training, conversion, by the recipe of PEFT's documentation; returns the trained model's logits."""
    model.peft_config["default"].init_lora_weights, before = True, model.peft_config["default"].init_lora_weights
    model.save_pretrained(folder / "start")
    model.peft_config["default"].init_lora_weights = before
    randomize(model, 3)
    model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "start"))
    return model(IDS).logits


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_peft_reads_the_converted_adapter_onto_its_own_base(build_model, fields, tmp_path):
    wanted = saved(ours(build_model, fields), tmp_path)
    close(peft.PeftModel.from_pretrained(build_model("llama").eval(), tmp_path / "plain")(IDS).logits, wanted, 1e-4)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_the_file_is_the_one_that_peft_writes(build_model, fields, tmp_path):
    saved(ours(build_model, fields), tmp_path / "ours")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": SOME} | fields)
    saved(peft.get_peft_model(build_model("llama").eval(), config), tmp_path / "theirs")
    got, want = (load_file(tmp_path / who / "plain" / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: tensor.shape for key, tensor in got.items()} == {key: tensor.shape for key, tensor in want.items()}
    for key in got:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            close(got[other] @ got[key], want[other] @ want[key], 1e-4)
    said, theirs = (
        json.loads((tmp_path / who / "plain" / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    )
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert said[name] == theirs[name], name


def test_a_start_that_peft_saved_is_known(build_model, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=SOME, init_lora_weights="pissa")
    theirs = peft.get_peft_model(build_model("llama").eval(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    model = randomize(ours(build_model, FIELDS["pissa"]), 3)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = minilora.PeftModel.from_pretrained(build_model("llama").eval(), tmp_path / "plain")
    close(loaded(IDS).logits, model(IDS).logits, 1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as embedding layers found:UserWarning")
def test_peft_loses_the_embedding_in_the_conversion(build_model, tmp_path):
    """PEFT 0.21.2 writes the factors called lora_A and lora_B and no others."""
    fields = {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]}
    saved(ours(build_model, fields), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(
            peft.get_peft_model(build_model("llama").eval(), peft.LoraConfig(r=4, lora_alpha=12, **fields)),
            tmp_path / "theirs",
        )
    got, want = (load_file(tmp_path / who / "plain" / "adapter_model.safetensors") for who in ("ours", "theirs"))
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    assert got[name].shape == (8, 64) and name not in want


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_a_second_load_in_peft_changes_the_base_once_more(build_model, tmp_path):
    """PEFT 0.21.2 takes the start out of the weights again; here the folder goes into the adapter that is there."""
    model = randomize(ours(build_model, FIELDS["pissa"]), 3).eval()
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    close(minilora.PeftModel.from_pretrained(model, tmp_path)(IDS).logits, wanted, 1e-6)
    theirs = peft.PeftModel.from_pretrained(build_model("llama").eval(), tmp_path)
    close(theirs(IDS).logits, wanted, 1e-4)
    again = peft.PeftModel.from_pretrained(theirs.get_base_model(), tmp_path).eval()
    assert (again(IDS).logits - wanted).abs().max() > 0.05 * wanted.abs().max()
