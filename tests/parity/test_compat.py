"""PEFT's other public names: a script that uses them gives the same with either import."""

import json

import peft
import pytest
import torch

import minilora

BOTH = pytest.mark.parametrize("library", [minilora, peft], ids=["minilora", "peft"])


def adapted(library, build_model, **fields):
    torch.manual_seed(1)
    config = library.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj"], task_type=library.TaskType.CAUSAL_LM, **fields
    )
    return library.get_peft_model(build_model("llama"), config)


@BOTH
def test_a_script_with_state_dicts(library, build_model, tmp_path):
    model = adapted(library, build_model)
    tensors = {name: torch.full_like(t, 0.25) for name, t in library.get_peft_model_state_dict(model).items()}
    library.set_peft_model_state_dict(model, tensors)
    again = library.get_peft_model_state_dict(model)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert sorted(again)[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    model.save_pretrained(tmp_path, safe_serialization=True)
    config = library.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, str(getattr(config.task_type, "value", config.task_type))) == (
        4,
        12,
        "CAUSAL_LM",
    )


def test_state_dicts_go_from_one_library_into_the_other(build_model, token_ids):
    theirs, ours = adapted(peft, build_model), adapted(minilora, build_model)
    tensors = {name: torch.randn_like(t) for name, t in peft.get_peft_model_state_dict(theirs).items()}
    peft.set_peft_model_state_dict(theirs, tensors)
    report = minilora.set_peft_model_state_dict(ours, tensors)
    assert not (report.missing_keys or report.unexpected_keys or report.mismatched_keys)
    torch.testing.assert_close(
        ours(token_ids).logits, theirs(token_ids).logits, rtol=1e-4, atol=5e-5
    )  # factors of size 1


def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(build_model):
    model = adapted(minilora, build_model)
    before = {name: t.clone() for name, t in minilora.get_peft_model_state_dict(model).items()}
    short = dict(list(before.items())[1:])
    with pytest.raises(minilora.MiniLoraError, match=r"lora_A\.weight is missing"):
        minilora.set_peft_model_state_dict(model, {name: t + 1 for name, t in short.items()})
    assert all(torch.equal(t, before[name]) for name, t in minilora.get_peft_model_state_dict(model).items())
    assert len(minilora.set_peft_model_state_dict(model, short, strict=False).missing_keys) == 1


@BOTH
def test_inject_adapter_in_model_takes_the_config_first(library, build_model):
    config = library.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"])
    model = library.inject_adapter_in_model(config, build_model("llama"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 and all("lora_" in name for name in names)


@BOTH
@pytest.mark.parametrize("widen", [True, False])
def test_autocast_adapter_dtype(library, build_model, widen):
    config = library.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"])
    model = library.get_peft_model(build_model("llama").bfloat16(), config, autocast_adapter_dtype=widen)
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert kinds == {torch.float32 if widen else torch.bfloat16}


@BOTH
def test_auto_model_finds_the_base_by_the_adapters_folder(library, build_model, token_ids, tmp_path):
    base = build_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = adapted(library, build_model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "minilora.json").unlink(missing_ok=True)  # the config is changed on purpose
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    again = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(again(token_ids).logits, model.eval()(token_ids).logits, rtol=0, atol=1e-6)


def test_auto_model_without_a_base_says_so(build_model, tmp_path):
    adapted(minilora, build_model).save_pretrained(tmp_path)
    with pytest.raises(minilora.MiniLoraError, match="names no base_model_name_or_path"):
        minilora.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_pickles_are_not_written(build_model, tmp_path):
    with pytest.raises(minilora.MiniLoraError, match="safe_serialization=False would write a pickle"):
        adapted(minilora, build_model).save_pretrained(tmp_path, safe_serialization=False)


def test_config_folder_round_trip(tmp_path):
    config = minilora.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], rank_pattern={"layers.1.q_proj": 2})
    config.save_pretrained(tmp_path)
    assert minilora.PeftConfig.from_pretrained(tmp_path).rank_pattern == {"layers.1.q_proj": 2}
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 4
