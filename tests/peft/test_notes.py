"""What a user is told when an adapter is made: PEFT's warnings, where they are true here."""

import pytest
import torch
from torch import nn

from minilora.errors import CheckpointError
from minilora.peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from minilora.peft.utils.save_and_load import get_peft_model_state_dict
from minilora.peft.utils.warning import PeftWarning
from tests.models import finished, gpt2, llama, lora, mlp, randomize


def said(recwarn):
    return [str(each.message) for each in recwarn]


NOT_SET, NOT_THERE, NOT_TOUCHED = "is not set to True", "no tied modules were found", "no tied modules are added"
CASES = {
    "a copy of a tied head": (True, {"modules_to_save": ["lm_head"]}, NOT_SET),
    "a copy of a tied table": (True, {"modules_to_save": ["embed_tokens"]}, NOT_SET),
    "an adapter on a tied head": (True, {"target_modules": ["lm_head", "v_proj"]}, NOT_SET),
    "nothing is tied": (False, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, NOT_THERE),
    "nothing that is tied is touched": (True, {"ensure_weight_tying": True}, NOT_TOUCHED),
    "not tied, not touched": (False, {}, None),
    "tied, not touched": (True, {}, None),
    "rows are shared with the head": (True, {"trainable_token_indices": [3, 5]}, None),
    "tied as asked": (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, None),
}


@pytest.mark.parametrize(("tied", "fields", "words"), CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("default")
def test_tied_weights(tied, fields, words, recwarn):
    get_peft_model(
        llama(tie_word_embeddings=tied), lora(**{"targets": fields.pop("target_modules", ["v_proj"])} | fields)
    )
    found = [text for text in said(recwarn) if "tying" in text]
    assert [words in text for text in found] == ([True] if words else [])


@pytest.mark.filterwarnings("default")
def test_rows_of_a_model_that_ties_nothing(recwarn):
    get_peft_model(llama(), lora(["v_proj"], trainable_token_indices=[3], ensure_weight_tying=True))
    assert any("ensure_weight_tying=True but the model does not have tied weights" in text for text in said(recwarn))


def test_lora_bias_on_a_layer_without_bias():
    with pytest.warns(PeftWarning, match="targeted layer of type Linear has no bias") as caught:
        model = get_peft_model(llama(), lora(["v_proj", "q_proj"], lora_bias=True))
    assert len(caught) == 1  # not one a layer
    ids = torch.tensor([[3, 9, 1]])
    wanted = randomize(model)(ids).logits
    merged = model.merge_and_unload()  # PEFT cannot merge it
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    get_peft_model(gpt2(), lora(["c_attn"], lora_bias=True))  # it has one


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_peft_takes_out_of_the_base(start, tmp_path):
    """minilora leaves the base alone, so both are exact; the warning is for who takes the folders to PEFT."""
    get_peft_model(mlp(), lora(["first"], init_lora_weights=start)).save_pretrained(tmp_path / "start")
    get_peft_model(mlp(), lora(["last"])).save_pretrained(tmp_path / "plain")
    word = {"pissa": "PiSSA", "olora": "OLoRA"}[start]
    for one, other in (("start", "plain"), ("plain", "start")):
        model = PeftModel.from_pretrained(mlp(), tmp_path / one)
        with pytest.warns(
            UserWarning, match=f"^{word} changes the base weights of the model and should thus not be used"
        ):
            model.load_adapter(tmp_path / other, "other")
    model = get_peft_model(mlp(), lora(["first"]))
    with pytest.warns(UserWarning, match=f"^{word} changes the base weights"):
        model.add_adapter("other", lora(["first"], init_lora_weights=start))


class Named(nn.Module):
    def __init__(self, name=None):
        super().__init__()
        self.lin = nn.Linear(6, 5)
        if name:
            self.name_or_path = name


@pytest.mark.parametrize(("named", "wanted"), [(None, None), ("the/real-one", "the/real-one")])
def test_the_file_names_the_base_that_the_model_names(named, wanted, tmp_path):
    """A config that was read beside another model must not make a file lie; PEFT writes the model's own name too."""
    config = LoraConfig(target_modules=["lin"], base_model_name_or_path="the/other-one")
    with pytest.warns(UserWarning, match=f"was renamed from 'the/other-one' to '{wanted}'"):
        model = get_peft_model(Named(named), config)
    assert model.peft_config["default"].base_model_name_or_path == wanted
    assert config.base_model_name_or_path == "the/other-one"
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == wanted


def test_a_state_dict_and_a_config_that_mean_other_layers():
    tensors = get_peft_model_state_dict(inject_adapter_in_model(lora(["first", "mid"]), mlp()))
    assert all(not key.startswith("base_model.") for key in tensors)
    model = mlp()
    with pytest.warns(
        RuntimeWarning, match=r"The PEFT config contained .*\['last'\].*The state_dict contained .*\['mid'\]"
    ):
        inject_adapter_in_model(lora(["first", "last"]), model, state_dict=tensors)
    assert get_peft_model_state_dict(model).keys() == tensors.keys()
    inject_adapter_in_model(lora(["first", "mid"]), mlp(), state_dict=tensors)
    inject_adapter_in_model(lora(["no such layer"]), mlp(), state_dict=tensors)  # it counts alone


def test_a_second_folder_on_a_model_with_adapters(tmp_path):
    first = randomize(get_peft_model(mlp(), lora(["first"])), 1).eval()
    first.save_pretrained(tmp_path / "one")
    randomize(first, 2).save_pretrained(tmp_path / "two")
    x = torch.randn(3, 12)
    wanted = first(x)
    model = PeftModel.from_pretrained(mlp(), tmp_path / "one")
    with pytest.warns(UserWarning, match="You are trying to modify a model with PEFT for a second time"):
        again = PeftModel.from_pretrained(model, tmp_path / "two")
    assert again is model and list(model.peft_config) == ["default"] and not model.training
    torch.testing.assert_close(model(x), wanted)
    with pytest.warns(UserWarning, match="for a second time"):
        PeftModel.from_pretrained(model, tmp_path / "one", "other", is_trainable=True)
    assert model.active_adapters == ["other"] and model.training and list(model.peft_config) == ["default", "other"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.first.lora_A.other.weight",
        "base_model.model.first.lora_B.other.weight",
    ]
    get_peft_model(mlp(), lora(["last"])).save_pretrained(tmp_path / "elsewhere")
    with (
        pytest.warns(UserWarning, match="for a second time"),
        pytest.raises(CheckpointError, match=r"missing|unexpected"),
    ):
        PeftModel.from_pretrained(model, tmp_path / "elsewhere")
    assert model.active_adapters == ["other"]


def test_ready_models_keep_quiet(recwarn):
    model = get_peft_model(llama(), lora(["v_proj"]))
    model.add_adapter("other", lora(["q_proj"]))
    inject_adapter_in_model(lora(), finished(mlp()))
    assert said(recwarn) == []
