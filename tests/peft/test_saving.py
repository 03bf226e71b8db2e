"""What users of PEFT, transformers and accelerate pass to ``save_pretrained`` and ``forward``: right, or refused by name."""

import inspect
import json

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file

import minilora
from tests.models import llama


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = minilora.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return minilora.get_peft_model(llama(), config).eval()


IDS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "README.md")


def tensors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "given",
    [{"save_function": torch.save}, {"max_shard_size": "5GB"}, {"push_to_hub": False}, {"state_dict": None},
     {"state_dict": {}}, {"selected_adapters": ["default"]}, {"selected_adapters": "default"}, {"token": "x"},
     {"safe_serialization": True}, {"variant": None}, {"save_peft_format": True}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_arguments_that_mean_nothing_for_an_adapter(model, tmp_path, given):
    model.save_pretrained(tmp_path, **given)
    assert files_of(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "minilora.json"]
    found = minilora.get_peft_model_state_dict(model)
    assert tensors_in(tmp_path).keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in tensors_in(tmp_path).items())


def test_save_function_of_accelerate(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    again = minilora.PeftModel.from_pretrained(llama(), tmp_path)  # its seal is whole
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_another_process_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "none", is_main_process=False, save_function=torch.save)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [({"push_to_hub": True}, r"model\.push_to_hub\(repo_id\)"), ({"variant": "fp16"}, "leave it out"),
     ({"safe_serialization": False}, "pickle"), ({"save_function": "torch.save"}, "wanted a function"),
     ({"selected_adapter": ["default"]}, "the closest are 'selected_adapters'"),
     ({"selected_adapters": ["nope"]}, "no adapter is called 'nope'"), ({"adapter_name": "x"}, "no argument")],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)  # fmt: skip
def test_arguments_that_ask_for_something_else_are_refused(model, tmp_path, given, said):
    with pytest.raises(minilora.MiniLoraError, match=said):
        model.save_pretrained(tmp_path / "folder", **given)
    assert not (tmp_path / "folder").exists()


def test_tensors_of_a_state_dict_are_the_ones_that_are_written(model, tmp_path):
    average = {key: tensor * 0.5 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    found = minilora.get_peft_model_state_dict(model)
    assert all(torch.equal(tensor, found[key] * 0.5) for key, tensor in tensors_in(tmp_path).items())
    again = minilora.PeftModel.from_pretrained(llama(), tmp_path)
    assert len(tensors_in(tmp_path)) == len(minilora.get_peft_model_state_dict(again)) > 0


def test_state_dict_that_has_some_of_an_adapter_is_refused(model, tmp_path):
    part = {key: tensor for key, tensor in model.state_dict().items() if "lora_A" in key}
    with pytest.raises(minilora.MiniLoraError, match="state_dict has no"):
        model.save_pretrained(tmp_path / "folder", state_dict=part)
    wrong = {key: tensor[:-1] if "lora_A" in key else tensor for key, tensor in model.state_dict().items()}
    with pytest.raises(minilora.MiniLoraError, match="the adapter's is"):
        model.save_pretrained(tmp_path / "folder", state_dict=wrong)
    assert not (tmp_path / "folder").exists()


def test_forward_takes_names_of_adapters_as_the_call_does(model):
    model.add_adapter("two", minilora.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False))
    names = ["default", "two", "__base__"]
    with torch.no_grad():
        found, wanted = model.forward(IDS, adapter_names=names).logits, model(IDS, adapter_names=names).logits
        assert torch.equal(found, wanted) and not torch.allclose(found, model(IDS).logits, atol=1e-4)
        assert torch.equal(model.forward(IDS).logits, model(IDS).logits)
    assert inspect.signature(model.forward) == inspect.signature(llama().forward)
    model.unload()
    assert inspect.signature(model.forward) == inspect.signature(llama().forward)
    assert "adapter_names" not in inspect.signature(type(model).forward).parameters


def test_names_of_transformers(model):
    bare = llama()
    with torch.no_grad():
        adapted = model(IDS).logits
        model.disable_adapters()
        assert torch.equal(model(IDS).logits, bare(IDS).logits) and not torch.equal(adapted, bare(IDS).logits)
        model.enable_adapters()
        assert torch.equal(model(IDS).logits, adapted)
    with pytest.raises(minilora.MiniLoraError, match="the name comes first"):
        model.add_adapter(minilora.LoraConfig(target_modules=["q_proj"]), "two")
    assert list(model.peft_config) == ["default"]


def test_config_in_the_folder_is_plain(model, tmp_path):
    model.save_pretrained(tmp_path, save_function=torch.save)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
