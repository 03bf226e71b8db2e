"""What is aside while the model changes must follow: train and eval mode, disabling, merging, resuming, tied twins."""

import pytest
import torch

import minilora
from minilora import LoraConfig, get_peft_model
from minilora.errors import CheckpointError, StateError
from minilora.store.load import restore_adapter


def config(**fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["first", "mid"]} | fields)


@pytest.fixture
def model(make_mlp, randomize):
    model = get_peft_model(make_mlp(), config(lora_dropout=0.5), "a")
    randomize(model, 1)
    model.add_adapter("b", config(lora_dropout=0.5))
    model.set_adapter("b")
    randomize(model, 2)
    model.set_adapter("a")
    return model


def dropping(model, x):
    return not torch.equal(model(x), model(x))


@pytest.fixture
def x(make_mlp):
    return torch.randn(6, next(make_mlp().parameters()).shape[1], generator=torch.Generator().manual_seed(2))


def test_an_adapter_that_was_aside_follows_into_eval_and_back(model, x):
    model.train()
    assert dropping(model, x)
    model.eval()
    model.set_adapter("b")
    assert not dropping(model, x)
    model.train()
    model.set_adapter("a")
    assert dropping(model, x)


def test_eval_while_merged_or_disabled_reaches_the_adapter(model, x):
    model.train()
    model.merge_adapter()
    model.eval()
    model.unmerge_adapter()
    assert not dropping(model, x)
    model.train()
    with model.disable_adapter():
        model.eval()
    assert not dropping(model, x)


def test_a_disabled_model_mixes_nothing(model, x):
    model.eval()
    with model.disable_adapter(), pytest.raises(StateError, match="adapters are disabled here"):
        model(x, adapter_names=["a"] * len(x))
    model(x, adapter_names=["a"] * len(x))


def test_switching_over_a_merged_adapter_is_refused(model, x):
    model.eval()
    model.merge_adapter(["a"])
    before = model(x)
    with pytest.raises(
        StateError, match=r"\['a'\] are merged and would stay in the weights; unmerge_adapter\(\) first"
    ):
        model.set_adapter("b")
    assert torch.equal(model(x), before) and model.active_adapters == ["a"]


@pytest.mark.parametrize("other", [{"lora_alpha": 64}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_resuming_from_another_scaling_is_refused(make_mlp, tmp_path, other):
    get_peft_model(make_mlp(), config(**other)).save_pretrained(tmp_path)
    target = get_peft_model(make_mlp(), config())
    kept = {name: tensor.clone() for name, tensor in minilora.get_peft_model_state_dict(target).items()}
    with pytest.raises(CheckpointError, match="resume with the config that it was saved with"):
        restore_adapter(target, tmp_path)
    now = minilora.get_peft_model_state_dict(target)
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("fault", ["nan", "twins"])
def test_a_state_dict_with_a_fault_changes_nothing(make_gpt2, fault):
    fields = {"target_modules": ["wte"], "ensure_weight_tying": True}
    target = get_peft_model(make_gpt2(), config(**fields))
    kept = {name: tensor.clone() for name, tensor in minilora.get_peft_model_state_dict(target).items()}
    bad = {name: torch.randn_like(tensor) for name, tensor in kept.items()}
    if fault == "nan":
        bad = {name: tensor.clone() for name, tensor in kept.items()}
        next(iter(bad.values())).view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN" if fault == "nan" else "differs from the embedding"):
        minilora.set_peft_model_state_dict(target, bad)
    now = minilora.get_peft_model_state_dict(target)
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())


def test_a_model_unloaded_by_the_plain_function_takes_adapters_again(make_mlp, x):
    plain = make_mlp()
    want = plain(x)
    model = minilora.unload(get_peft_model(plain, config()))
    again = get_peft_model(model, config())
    assert torch.equal(again(x), want) and again.active_adapters == ["default"]
    again.unload()
    assert type(again) is type(make_mlp())


def test_saving_checks_the_names_first(model, tmp_path):
    model.save_pretrained(tmp_path / "one", selected_adapters="b")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"README.md", "b"}
    with pytest.raises(StateError, match="no adapter is called 'nope'"):
        model.save_pretrained(tmp_path / "two", selected_adapters=["a", "nope"])
    assert not (tmp_path / "two").exists()


def test_a_change_of_dtype_reaches_what_is_aside(model, x):
    model.eval()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.set_adapter("b")
    assert model(x.bfloat16()).dtype == torch.bfloat16
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.bfloat16}
