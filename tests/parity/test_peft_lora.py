"""LoRA as PEFT does it: the same start, the same steps, the same files, for Llama (Linear) and GPT-2 (Conv1D)."""

import contextlib
import copy
import dataclasses
import json
import re
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors import safe_open
from safetensors.torch import load_file

import minilora
from minilora.linear.ops import cpu_has_bf16
from minilora.report.inspect import adapters_in
from tests.models import adapted_paths

# PEFT reads the orientation of a layer from its config and says so when it has to correct the config.
CONV1D = "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
# PEFT asks transformers for the old name of this property, also where a test turns warnings into errors.
OLD_NAME = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(CONV1D)

PREFIX = "base_model.model."
TOLERANCE = {"rtol": 0, "atol": 5e-6}  # the update is added in another order: a few roundings of fp32

LLAMA = {
    "default targets": {},
    "two names": {"target_modules": ["q_proj", "down_proj"]},
    "full path": {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "regex and exclude": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "names and exclude regex": {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": r".*layers\.1\..*"},
    "modules_to_save": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "embeddings saved": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
    "bias all": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 16, "q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5},
    },
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "rslora and patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
    },
    "gaussian": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "gaussian"},
}
GPT2 = {
    "default targets": {},
    "two names": {"target_modules": ["c_attn", "c_proj"]},
    "full path": {"target_modules": ["transformer.h.1.mlp.c_fc", "attn.c_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.mlp\.c_(fc|proj)"},
    "names and exclude": {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["h.0.mlp.c_proj"]},
    "modules_to_save": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
    "bias all": {"target_modules": ["c_attn"], "bias": "all"},
    "bias lora_only": {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
    "patterns": {
        "target_modules": ["c_attn", "c_proj"],
        "rank_pattern": {"attn.c_proj": 2, "c_proj": 6},
        "alpha_pattern": {"h.1.attn.c_attn": 3},
    },
    "rslora": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True},
    "gaussian": {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "gaussian"},
}
CASES = [
    pytest.param(family, fields, id=f"{family}-{name}")
    for family, table in (("llama", LLAMA), ("gpt2", GPT2))
    for name, fields in table.items()
]
NOT_ALL_LINEAR = [case for case in CASES if not case.id.endswith("all-linear")]
every_case = pytest.mark.parametrize(("family", "fields"), CASES)
both_families = pytest.mark.parametrize("family", ["llama", "gpt2"])


def wrap(library, model, fields, seed=11, **more):
    """``model`` with a new adapter; minilora and PEFT differ in nothing but the module whose names are called."""
    config = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **copy.deepcopy(fields), **more}
    torch.manual_seed(seed)
    return library.get_peft_model(model, library.LoraConfig(**config))


def trainable(model):
    """The parameters that train, under the names that an adapter file has for them."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".default", "")
            suffix = ".weight" if name.endswith(("lora_A", "lora_B")) else ""
            named[PREFIX + name + suffix] = parameter
    return named


def disturb(model, seed=5):
    """Move every trainable parameter by noise that depends on its name in the file only: a trained adapter."""
    with torch.no_grad():
        for key, parameter in sorted(trainable(model).items()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(key)))
            parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same_tensors(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for key in theirs:
        told = {"msg": lambda text, key=key: f"{key}: {text}", **(tolerance or {"rtol": 0, "atol": 0})}
        torch.testing.assert_close(ours[key], theirs[key], **told)


@pytest.fixture
def pair(build_model):
    """``pair(family, fields)``: minilora's and PEFT's model over equal bases, both disturbed equally."""

    def make(family, fields, **more):
        return tuple(disturb(wrap(library, build_model(family), fields, **more)) for library in (minilora, peft))

    return make


@pytest.fixture
def files(pair, tmp_path):
    """``files(family, fields)``: adapter folders written by minilora and by PEFT from equal adapters."""

    def make(family, fields, **more):
        for name, model in zip(("ours", "theirs"), pair(family, fields, **more), strict=True):
            model.save_pretrained(tmp_path / name)
        return tmp_path / "ours", tmp_path / "theirs"

    return make


# The start


@every_case
def test_same_seed_gives_bit_equal_trainable_tensors(build_model, family, fields):
    ours, theirs = (trainable(wrap(library, build_model(family), fields)) for library in (minilora, peft))
    assert_same_tensors(ours, theirs)
    assert all((tensor == 0).all() for key, tensor in ours.items() if ".lora_B." in key)
    assert all((tensor != 0).any() for key, tensor in ours.items() if ".lora_A." in key)


@both_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_same_seed_gives_bit_equal_start_on_a_half_precision_base(build_model, family, dtype, init):
    fields = {"target_modules": "all-linear", "init_lora_weights": init}
    ours, theirs = (trainable(wrap(library, build_model(family, dtype), fields)) for library in (minilora, peft))
    assert_same_tensors(ours, theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


@both_families
def test_same_seed_gives_bit_equal_start_with_both_factors_random(build_model, family):
    fields = {"target_modules": "all-linear", "init_lora_weights": False}
    ours, theirs = (trainable(wrap(library, build_model(family), fields)) for library in (minilora, peft))
    assert_same_tensors(ours, theirs)
    assert all((tensor != 0).any() for tensor in ours.values())


@both_families
def test_generator_stands_where_peft_leaves_it(build_model, family):
    states = []
    for library in (minilora, peft):
        wrap(library, build_model(family), {"target_modules": "all-linear"})
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@every_case
def test_fresh_adapter_leaves_logits_bit_equal(build_model, token_ids, family, fields):
    base = build_model(family)
    expected = logits(base, token_ids)
    assert torch.equal(logits(wrap(minilora, base, fields), token_ids), expected)


@both_families
def test_fresh_adapter_leaves_bf16_logits_as_exact_as_the_processor_allows(build_model, token_ids, family):
    base = build_model(family, torch.bfloat16)
    truth = logits(copy.deepcopy(base).double(), token_ids)
    expected = logits(base, token_ids)
    found = logits(wrap(minilora, base, {"target_modules": "all-linear"}), token_ids)
    if cpu_has_bf16():
        assert torch.equal(found, expected)
    else:  # multiplied in fp32 then: not torch's own rounding, and nearer to the truth
        assert found.dtype == torch.bfloat16
        assert (found - truth).square().mean() < 1.2 * (expected - truth).square().mean()


@every_case
def test_scaling_of_every_layer_is_equal(build_model, family, fields):
    ours, theirs = (wrap(library, build_model(family), fields) for library in (minilora, peft))
    found, wanted = (
        {name: layer.scaling["default"] for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        for model in (ours, theirs)
    )
    assert found == wanted and found
    assert {path: layer.scaling for path, layer in adapters_in(ours).items()} == {
        name.removeprefix(PREFIX): scaling for name, scaling in wanted.items()
    }


# One step and five


@every_case
def test_logits_of_a_trained_adapter_are_equal(pair, token_ids, family, fields):
    ours, theirs = pair(family, fields)
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), **TOLERANCE)


@both_families
def test_logits_of_a_trained_adapter_on_a_bf16_base_agree_to_bf16(build_model, token_ids, family):
    ours, theirs = (disturb(wrap(lib, build_model(family, torch.bfloat16), {"target_modules": "all-linear"}))
                    for lib in (minilora, peft))  # fmt: skip
    found, wanted = logits(ours, token_ids), logits(theirs, token_ids)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert (found - wanted).float().norm() < 0.02 * wanted.float().norm()


@every_case
def test_loss_and_gradients_are_equal_after_one_backward(pair, token_ids, family, fields):
    losses, gradients = [], []
    for model in pair(family, fields):
        loss = model(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({key: parameter.grad for key, parameter in trainable(model).items()})
    torch.testing.assert_close(*losses, **TOLERANCE)
    assert_same_tensors(*gradients, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().max() > 0 for key, gradient in gradients[0].items() if ".lora_" in key)


@both_families
def test_gradients_are_equal_with_dropout_under_one_seed(pair, token_ids, family):
    """In the plain formula, which draws as PEFT does; a hook on a base layer asks for it. The fused one draws a seed instead."""
    gradients = []
    for model in pair(family, {"target_modules": "all-linear"}, lora_dropout=0.3):
        for path, module in model.named_modules():
            if path.endswith("base_layer"):
                module.register_forward_hook(lambda *_: None)
        torch.manual_seed(1)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in trainable(model).items()})
    assert_same_tensors(*gradients, rtol=1e-5, atol=1e-6)


@both_families
def test_dropout_is_off_in_eval_mode_as_in_peft(pair, token_ids, family):
    ours, theirs = pair(family, {"target_modules": "all-linear"}, lora_dropout=0.3)
    torch.testing.assert_close(logits(ours.eval(), token_ids), logits(theirs.eval(), token_ids), **TOLERANCE)


def train(model, ids, steps=5):
    """Losses of AdamW steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def without_key_bias(model):
    """What trains, less the bias of GPT-2's keys: softmax does not see it, so its gradient is rounding, which Adam takes for a step."""
    tensors = {key: parameter.detach().clone() for key, parameter in trainable(model).items()}
    for key, tensor in tensors.items():
        if "c_attn" in key and key.endswith("bias") and "lora" not in key:
            third = len(tensor) // 3
            tensor[third : 2 * third] = 0
    return tensors


@every_case
def test_five_adamw_steps_give_equal_losses_and_weights(build_model, token_ids, family, fields):
    ours, theirs = (wrap(library, build_model(family), fields) for library in (minilora, peft))
    before = {key: parameter.detach().clone() for key, parameter in trainable(ours).items()}
    found, wanted = train(ours, token_ids), train(theirs, token_ids)
    assert found == pytest.approx(wanted, rel=0, abs=1e-6)
    assert found[-1] < found[0]
    assert_same_tensors(without_key_bias(ours), without_key_bias(theirs), **TOLERANCE)
    assert all((before[key] != parameter).any() for key, parameter in trainable(ours).items() if ".lora_" in key)


@every_case
def test_five_adamw_steps_leave_the_base_as_it_was(build_model, token_ids, family, fields):
    model = wrap(minilora, build_model(family), fields)
    train(model, token_ids)
    assert_same_tensors(model.unload().state_dict(), build_model(family).state_dict())


# What trains, and how much


@every_case
def test_the_same_parameters_train(build_model, family, fields):
    ours, theirs = (wrap(library, build_model(family), fields) for library in (minilora, peft))
    assert trainable(ours).keys() == trainable(theirs).keys()


@every_case
def test_print_trainable_parameters_prints_the_identical_line(build_model, capsys, family, fields):
    lines = []
    for library in (minilora, peft):
        model = wrap(library, build_model(family), fields)
        capsys.readouterr()
        model.print_trainable_parameters()
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and lines[0].startswith("trainable params: ")


def test_print_trainable_parameters_prints_the_documented_line(build_model, capsys):
    wrap(minilora, build_model("gpt2"), {"target_modules": ["c_attn"]}).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 512 || all params: 8,640 || trainable%: 5.9259\n"


# Files


@every_case
def test_file_of_peft_gives_the_same_logits_in_minilora(build_model, pair, token_ids, tmp_path, family, fields):
    _, theirs = pair(family, fields)
    theirs.save_pretrained(tmp_path)
    loaded = minilora.PeftModel.from_pretrained(build_model(family), tmp_path)
    torch.testing.assert_close(logits(loaded, token_ids), logits(theirs.eval(), token_ids), **TOLERANCE)


@every_case
def test_file_of_minilora_gives_the_same_logits_in_peft_without_a_warning(
    build_model, pair, token_ids, tmp_path, family, fields
):
    ours, _ = pair(family, fields)
    ours.save_pretrained(tmp_path)
    base = build_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OLD_NAME, category=FutureWarning)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded, token_ids), logits(ours.eval(), token_ids), **TOLERANCE)


@every_case
def test_tensor_files_are_equal_in_keys_shapes_dtypes_and_values(files, family, fields):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in files(family, fields))
    assert_same_tensors(ours, theirs)  # compares dtype and shape too


@both_families
def test_tensor_files_have_equal_metadata(files, family):
    found = []
    for folder in files(family, {}):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            found.append(file.metadata())
    assert found[0] == found[1] == {"format": "pt"}


def config_of(folder):
    """The saved config, with what PEFT keeps as sets (so in any order) as sets."""
    content = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(content[name], list):
            content[name] = set(content[name])
    return content


@pytest.mark.parametrize(("family", "fields"), NOT_ALL_LINEAR)
def test_config_files_are_equal_in_keys_and_values(files, family, fields):
    ours, theirs = map(config_of, files(family, fields))
    assert ours == theirs


@both_families
def test_config_files_for_all_linear_are_equal_but_for_how_they_spell_the_layers(files, build_model, family):
    ours, theirs = map(config_of, files(family, {"target_modules": "all-linear"}))
    paths = [name for name, _ in build_model(family).named_modules()]
    found, wanted = (
        {path for path in paths for entry in content["target_modules"] if matches([path], [entry])}
        for content in (ours, theirs)
    )
    assert found == wanted != set()
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name != "target_modules")


@pytest.mark.parametrize(("family", "name"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_config_files_are_equal_in_text(files, family, name):
    ours, theirs = (
        (folder / "adapter_config.json").read_text().strip() for folder in files(family, {"target_modules": [name]})
    )
    assert ours == theirs


# A pattern's key is a regular expression for the last components of a path: "(v_)?proj" is v_proj and not q_proj.
REGEX_PATTERNS = {
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"(v_)?proj": 3},
    "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 7},
}


def test_regex_patterns_give_the_ranks_and_the_logits_of_peft(pair, token_ids):
    ours, theirs = pair("llama", REGEX_PATTERNS)
    shapes = [{key: tuple(parameter.shape) for key, parameter in trainable(model).items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and {shape[0] for key, shape in shapes[0].items() if ".lora_A." in key} == {3, 4}
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), **TOLERANCE)


@pytest.mark.parametrize("library", [minilora, peft], ids=["minilora", "peft"])
def test_file_of_minilora_with_regex_patterns_gives_the_same_logits(build_model, pair, token_ids, tmp_path, library):
    ours, _ = pair("llama", REGEX_PATTERNS)
    ours.save_pretrained(tmp_path)
    loaded = library.PeftModel.from_pretrained(build_model("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded, token_ids), logits(ours.eval(), token_ids), **TOLERANCE)


def test_file_of_peft_with_regex_patterns_is_read_only_with_a_config_given(build_model, pair, token_ids, tmp_path):
    _, theirs = pair("llama", REGEX_PATTERNS)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(minilora.MiniLoraError, match="regular expression"):
        minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path)
    config = minilora.LoraConfig(r=4, lora_alpha=12, **REGEX_PATTERNS)
    loaded = minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path, config=config)
    torch.testing.assert_close(logits(loaded, token_ids), logits(theirs.eval(), token_ids), **TOLERANCE)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_order_of_patterns_survives_the_file(build_model, pair, token_ids, tmp_path, field):
    ours, _ = pair("gpt2", {"target_modules": ["c_proj"], field: {"mlp.c_proj": 3, "c_proj": 5}})
    ours.save_pretrained(tmp_path)
    loaded = minilora.PeftModel.from_pretrained(build_model("gpt2"), tmp_path)
    torch.testing.assert_close(logits(loaded, token_ids), logits(ours.eval(), token_ids), **TOLERANCE)


@both_families
def test_config_files_without_task_type_are_equal(files, family):
    ours, theirs = map(config_of, files(family, {}, task_type=None))
    assert ours == theirs


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_config_files_have_equal_key_sets_for_every_task_type(files, task_type):
    ours, theirs = map(config_of, files("gpt2", {}, task_type=task_type))
    assert ours.keys() == theirs.keys()
    assert ours["task_type"] == theirs["task_type"] == task_type


@every_case
def test_config_file_of_peft_is_unchanged_by_reading_and_writing(files, build_model, tmp_path, family, fields):
    _, theirs = files(family, fields)
    minilora.PeftModel.from_pretrained(build_model(family), theirs).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(theirs)


@every_case
def test_tensor_file_of_peft_is_unchanged_by_reading_and_writing(files, build_model, tmp_path, family, fields):
    _, theirs = files(family, fields)
    minilora.PeftModel.from_pretrained(build_model(family), theirs).save_pretrained(tmp_path / "again")
    assert_same_tensors(*(load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", theirs)))


# Loading


@both_families
def test_loaded_adapter_is_in_eval_mode_and_frozen_as_in_peft(files, build_model, family):
    ours, _ = files(family, {})
    for library in (minilora, peft):
        model = library.PeftModel.from_pretrained(build_model(family), ours)
        assert not any(module.training for module in model.modules())
        assert not trainable(model)


@both_families
def test_loaded_biases_and_copies_are_frozen_where_peft_leaves_biases_to_train(files, build_model, family):
    folder, _ = files(family, {"bias": "lora_only", "modules_to_save": ["model.norm" if family == "llama" else "ln_f"]})
    ours, theirs = (
        trainable(library.PeftModel.from_pretrained(build_model(family), folder)) for library in (minilora, peft)
    )
    assert not ours
    assert all(key.endswith(".bias") for key in theirs)


def load_trainable(library, base, folder):
    return library.PeftModel.from_pretrained(base, folder, is_trainable=True)


@both_families
def test_adapter_loaded_as_trainable_trains_the_same_parameters_as_in_peft(files, build_model, family):
    folder, _ = files(family, {"bias": "lora_only"})
    ours, theirs = (
        lib.PeftModel.from_pretrained(build_model(family), folder, is_trainable=True) for lib in (minilora, peft)
    )
    assert trainable(ours).keys() == trainable(theirs).keys() != set()
    assert ours.training == theirs.training is True


@both_families
def test_adapter_loaded_as_trainable_continues_training_as_in_peft(files, build_model, token_ids, family):
    folder, _ = files(family, {})
    ours, theirs = (
        lib.PeftModel.from_pretrained(build_model(family), folder, is_trainable=True) for lib in (minilora, peft)
    )
    assert train(ours, token_ids) == pytest.approx(train(theirs, token_ids), rel=0, abs=1e-6)
    assert_same_tensors(trainable(ours), trainable(theirs), **TOLERANCE)


@both_families
def test_adapter_loaded_as_trainable_into_an_eval_model_is_in_train_mode_as_in_peft(files, build_model, family):
    folder, _ = files(family, {})
    for library in (minilora, peft):
        assert load_trainable(library, build_model(family).eval(), folder).training


# Merging


@every_case
def test_merged_weights_are_equal(pair, family, fields):
    ours, theirs = pair(family, fields)
    assert_same_tensors(ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict())


@every_case
def test_merged_model_computes_what_the_adapter_did(pair, token_ids, family, fields):
    ours, _ = pair(family, fields)
    expected = logits(ours, token_ids)
    torch.testing.assert_close(logits(ours.merge_and_unload(), token_ids), expected, rtol=1e-5, atol=1e-5)


@every_case
def test_model_merged_in_place_gives_the_logits_of_peft(pair, token_ids, family, fields):
    ours, theirs = pair(family, fields)
    ours.merge_adapter()
    theirs.merge_adapter()
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), **TOLERANCE)


@both_families
def test_unmerged_weights_are_those_of_peft(pair, family):
    weights = []
    for model in pair(family, {"target_modules": "all-linear"}):
        model.merge_adapter()
        model.unmerge_adapter()
        weights.append(model.unload().state_dict())
    assert_same_tensors(*weights, **TOLERANCE)


@every_case
def test_unloaded_model_is_the_base(pair, build_model, family, fields):
    ours, _ = pair(family, fields)
    assert_same_tensors(ours.unload().state_dict(), build_model(family).state_dict())


ONLY_LORA = [case for case in CASES if not {"bias", "modules_to_save"} & case.values[1].keys()]


# PEFT trains biases in place and leaves trained copies of modules behind: there unload() does not give the base back.
@pytest.mark.parametrize(("family", "fields"), ONLY_LORA)
def test_unloaded_model_is_that_of_peft(pair, family, fields):
    assert_same_tensors(*(model.unload().state_dict() for model in pair(family, fields)))


# A trained copy of a head that shares its weight with the embedding

tied_head = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"
)
TIED = {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}


@tied_head
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_copy_of_a_tied_head_trains_alone_with_the_logits_of_peft(pair, build_model, token_ids):
    ours, theirs = pair("gpt2", TIED)
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), **TOLERANCE)
    assert torch.equal(ours.get_input_embeddings().weight, build_model("gpt2").get_input_embeddings().weight)
    assert not torch.equal(ours.lm_head.weight, ours.get_input_embeddings().weight)


@tied_head
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_files_with_a_copy_of_a_tied_head_are_equal(files):
    assert_same_tensors(*(load_file(folder / "adapter_model.safetensors") for folder in files("gpt2", TIED)))


@tied_head
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning")
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_merged_weights_with_a_copy_of_a_tied_head_are_equal(pair):
    ours, theirs = pair("gpt2", TIED)
    assert_same_tensors(ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict())


# Several adapters, and none


def two_adapters(build_model, family, first, second):
    ours, theirs = (wrap(library, build_model(family), first) for library in (minilora, peft))
    fields = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", **second}
    torch.manual_seed(12)
    ours.add_adapter("second", minilora.LoraConfig(**fields))
    torch.manual_seed(12)
    theirs.add_adapter("second", peft.LoraConfig(**fields))
    for name in ("default", "second"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        with torch.no_grad():
            for model in (ours, theirs):
                for key, parameter in sorted(model.named_parameters()):
                    if parameter.requires_grad:
                        generator = torch.Generator().manual_seed(
                            sum(map(ord, key.split(".lora_")[0][-20:])) + ("lora_B" in key)
                        )
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ours, theirs


SECOND = {"llama": {"target_modules": ["q_proj", "up_proj"]}, "gpt2": {"target_modules": ["c_attn", "c_fc"]}}


@both_families
@pytest.mark.parametrize("name", ["default", "second"])
def test_one_of_two_adapters_gives_the_logits_of_peft(build_model, token_ids, family, name):
    ours, theirs = two_adapters(build_model, family, {}, SECOND[family])
    ours.set_adapter(name)
    theirs.set_adapter(name)
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), **TOLERANCE)


@both_families
def test_switching_freezes_the_parameters_of_the_other_adapter_as_in_peft(build_model, family):
    for model in two_adapters(build_model, family, {}, SECOND[family]):
        model.set_adapter("default")
        held = trainable(model)
        model.set_adapter("second")
        assert held and not any(parameter.requires_grad for parameter in held.values())
        assert trainable(model)


@both_families
@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"]])
def test_two_active_adapters_give_the_logits_of_peft(build_model, token_ids, family, names):
    ours, theirs = two_adapters(build_model, family, {}, SECOND[family])
    alone = []
    for name in names:
        ours.set_adapter(name)
        alone.append(logits(ours, token_ids))
    ours.set_adapter(names)
    theirs.base_model.set_adapter(names)
    both = logits(ours, token_ids)
    torch.testing.assert_close(both, logits(theirs, token_ids), **TOLERANCE)
    assert all((both - one).abs().max() > 1e-3 for one in alone)


@both_families
def test_two_active_adapters_give_the_gradients_of_peft(build_model, token_ids, family):
    ours, theirs = two_adapters(build_model, family, {}, SECOND[family])
    ours.set_adapter(["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    for model in (ours, theirs):
        model(input_ids=token_ids, labels=token_ids).loss.backward()
    found = [sorted(p.grad.norm().item() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert len(found[0]) == len(found[1]) and found[0] == pytest.approx(found[1], rel=1e-5)


@both_families
def test_two_merged_adapters_give_the_weights_of_peft(build_model, family):
    ours, theirs = two_adapters(build_model, family, {}, SECOND[family])
    names = ["default", "second"]
    merged = [model.merge_and_unload(adapter_names=names).state_dict() for model in (ours, theirs)]
    assert_same_tensors(*merged, **TOLERANCE)


@both_families
def test_files_of_two_adapters_are_those_of_peft(build_model, tmp_path, family):
    ours, theirs = two_adapters(build_model, family, {}, SECOND[family])
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    for inner in (".", "second"):
        found, wanted = (
            load_file(tmp_path / name / inner / "adapter_model.safetensors") for name in ("ours", "theirs")
        )
        assert_same_tensors(found, wanted)


@every_case
def test_disabled_adapter_gives_the_logits_of_the_base(pair, build_model, token_ids, family, fields):
    ours, _ = pair(family, fields)
    expected, adapted = logits(build_model(family), token_ids), logits(ours, token_ids)
    assert not torch.equal(adapted, expected)
    with ours.disable_adapter():
        assert torch.equal(logits(ours, token_ids), expected)
    assert torch.equal(logits(ours, token_ids), adapted)


@both_families
def test_disabled_adapter_gives_the_logits_of_peft_and_trains_again_after(pair, token_ids, family):
    ours, theirs = pair(family, {"target_modules": "all-linear"})
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), **TOLERANCE)
    assert trainable(ours).keys() == trainable(theirs).keys() != set()


# Targets, separated by blanks

NAMES = {
    "llama": """q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head self_attn.q_proj mlp.up_proj
        layers.0.self_attn.v_proj model.layers.1.mlp.down_proj 1.self_attn.o_proj proj _proj layers.2.mlp.up_proj
        self_attn mlp model.layers.0.q_proj q norm""",
    "gpt2": """c_attn c_proj c_fc lm_head attn.c_proj mlp.c_proj h.0.attn.c_attn transformer.h.1.mlp.c_fc
        1.mlp.c_proj attn proj h.2.attn.c_attn h.1.c_attn mlp c_ ln_f""",
}
REGEXES = {
    "llama": r""".*\.(q|v)_proj .*_proj .*layers\.[01]\..*(gate|down)_proj model\.layers\.1\.mlp\..*_proj q_proj
        .*mlp.* .*layers\.1\..* (?!.*layers\.0).*_proj$ lm_head nothing""",
    "gpt2": r""".*c_attn .*\.mlp\.c_(fc|proj) transformer\.h\.0\..*c_.* c_attn .*h\.1.* lm_head .*(c_attn|lm_head)
        nothing""",
}


def selections(family):
    names = st.lists(st.sampled_from(NAMES[family].split()), min_size=1, max_size=4, unique=True)
    return names | st.sampled_from(REGEXES[family].split())


def matches(paths, selection):
    """Whether every entry of a selection stands for some module, by the rule that both libraries document."""
    if isinstance(selection, str):
        return any(re.fullmatch(selection, path) for path in paths)
    return all(any(("." + path).endswith("." + entry) for path in paths) for entry in selection)


@st.composite
def requests(draw):
    family = draw(st.sampled_from(["llama", "gpt2"]))
    fields = {"target_modules": draw(selections(family) | st.just("all-linear"))}
    if draw(st.booleans()):
        fields["exclude_modules"] = draw(selections(family))
    if draw(st.integers(0, 3)) == 0:
        fields["modules_to_save"] = [draw(st.sampled_from(["lm_head", "down_proj" if family == "llama" else "c_fc"]))]
    return family, fields


def targeted(build_model, library, family, fields):
    """Names of the adapted modules, or None where the library refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what minilora refuses
        try:
            model = wrap(library, build_model(family, tied=False), fields)
        except ValueError:
            return None
    if library is peft:
        return set(model.base_model.targeted_module_names)
    return set(adapted_paths(model))


def test_fuzzed_selections_target_the_modules_that_peft_targets(build_model):
    seen = {"accepted": 0, "refused": 0, "typo": 0}

    @settings(max_examples=120)
    @given(request=requests())
    def check(request):
        family, fields = request
        paths = [name for name, _ in build_model(family, tied=False).named_modules() if name]
        chosen = [
            fields[name]
            for name in ("target_modules", "exclude_modules")
            if fields.get(name) not in (None, "all-linear")
        ]
        found, wanted = (targeted(build_model, library, family, fields) for library in (minilora, peft))
        if wanted is None:
            seen["refused"] += 1
            assert found is None
        elif all(selection == "all-linear" or matches(paths, selection) for selection in chosen):
            seen["accepted"] += 1
            assert found == wanted
        else:
            seen["typo"] += 1  # PEFT passes over an entry that matches nothing
            assert found is None

    check()
    assert min(seen.values()) >= 10, f"{seen}: the fuzzed selections have become one-sided"


@pytest.mark.parametrize(("family", "per_layer"), [("llama", 7), ("gpt2", 4)])
def test_all_linear_targets_every_layer_but_the_head_as_peft(build_model, family, per_layer):
    fields = {"target_modules": "all-linear"}
    found, wanted = (targeted(build_model, library, family, fields) for library in (minilora, peft))
    assert found == wanted and len(found) == 2 * per_layer and "lm_head" not in found


def test_modules_to_save_matches_every_path_that_ends_so(build_model):
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    ours, theirs = (trainable(wrap(library, build_model("llama"), fields)) for library in (minilora, peft))
    copied = [{key for key in keys if ".lora_" not in key} for keys in (ours, theirs)]
    assert copied[0] == copied[1] and any("input_layernorm" in key for key in copied[0])


@contextlib.contextmanager
def unchanged(config):
    before = copy.deepcopy(dataclasses.asdict(config))
    yield
    assert dataclasses.asdict(config) == before


@both_families
def test_config_is_not_changed_by_a_model_where_peft_changes_its_own(build_model, family):
    config = minilora.LoraConfig(r=4, lora_alpha=12)
    with unchanged(config):
        minilora.get_peft_model(build_model(family), config)
    theirs = peft.LoraConfig(r=4, lora_alpha=12)
    peft.get_peft_model(build_model(family), theirs)
    assert theirs.target_modules is not None  # PEFT wrote the default of the architecture into it


def test_typo_in_a_pattern_is_reported_as_peft_does(build_model):
    fields = {"target_modules": ["q_proj"], "rank_pattern": {"q_porj": 2}}
    with pytest.warns(RuntimeWarning, match="q_porj"):
        wrap(peft, build_model("llama"), fields)
    with pytest.raises(minilora.MiniLoraError, match="q_porj"):
        wrap(minilora, build_model("llama"), fields)
