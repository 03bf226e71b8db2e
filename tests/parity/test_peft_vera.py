"""VeRA in PEFT's own layout (``peft_type: VERA``), both ways: the same random matrices, the same outputs, the same training."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from safetensors.torch import load_file, save_file

import minilora
from minilora.lora.inject import build, place
from minilora.lora.slots import adapters_of
from minilora.lora.variants.vera import VeRALinear, drawn, shared_factor
from minilora.lora.vera_config import VeraConfig
from minilora.peft import VeraConfig as Shown
from minilora.store.load import read_adapter, restore_adapter, save_adapter

# PEFT's word on matrices that are drawn again; here that is what is tested.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*shares its weight with another layer:UserWarning"),
]
FAMILIES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
CASES = {
    "plain": {},
    "key": {"projection_prng_key": 7, "d_initial": 0.3},
    "not saved": {"projection_prng_key": 7, "save_projection": False},
    "dropout": {"vera_dropout": 0.25},
    "bias": {"bias": "vera_only"},
    "bias all": {"bias": "all"},
    "copies": {"modules_to_save": ["lm_head"]},
    "one layer": {"layers_to_transform": [1]},
}
every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def config(library, family, **fields):
    made = peft.VeraConfig if library is peft else VeraConfig
    return made(**{"r": 5, "target_modules": FAMILIES[family], "fan_in_fan_out": family == "gpt2", **fields})


def move(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def layers_of(model):
    return [value for value in adapters_of(model).named("default").values() if isinstance(value, VeRALinear)]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@every_case
@every_family
def test_folder_opens_in_the_other_library_with_the_same_outputs(build_model, token_ids, tmp_path, family, case):
    for there, here in ((peft, minilora), (minilora, peft)):
        model = move(there.get_peft_model(build_model(family), config(there, family, **copy.deepcopy(CASES[case]))))
        wanted = logits(model, token_ids)
        assert (wanted - logits(build_model(family), token_ids)).abs().max() > 0.01
        model.save_pretrained(tmp_path / there.__name__)
        opened = here.PeftModel.from_pretrained(build_model(family), tmp_path / there.__name__)
        torch.testing.assert_close(logits(opened, token_ids), wanted, rtol=0, atol=5e-6)
        again = tmp_path / f"{there.__name__} again"
        opened.save_pretrained(again)
        torch.testing.assert_close(
            logits(there.PeftModel.from_pretrained(build_model(family), again), token_ids), wanted, rtol=0, atol=5e-6
        )


@every_case
@every_family
def test_files_have_the_same_keys_shapes_and_config(build_model, tmp_path, family, case):
    said, held = [], []
    for library in (peft, minilora):
        model = library.get_peft_model(build_model(family), config(library, family, **copy.deepcopy(CASES[case])))
        model.save_pretrained(tmp_path / library.__name__)
        content = json.loads((tmp_path / library.__name__ / "adapter_config.json").read_text())
        said.append({**content, "target_modules": sorted(content["target_modules"]), "base_model_name_or_path": None})
        held.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
    assert said[0] == said[1]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][key], held[1][key]) for key in held[0])  # the start, and the two matrices
    assert ("base_model.vera_A" in held[0]) == CASES[case].get("save_projection", True)


def test_a_step_of_training_is_pefts(build_model, token_ids):
    found = []
    for library in (peft, minilora):
        model = library.get_peft_model(build_model("llama"), config(library, "llama")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=token_ids, labels=token_ids).loss.backward()
            optimizer.step()
        found.append(library.get_peft_model_state_dict(model))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=0, atol=1e-5, msg=key)
    assert found[0]["base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"].abs().max() > 1e-3


def test_update_is_the_formula_in_double_precision(build_model):
    model = move(minilora.get_peft_model(build_model("llama"), config(minilora, "llama", projection_prng_key=3)))
    A, B = drawn(3, 5, 96, 64)
    layers = layers_of(model)
    assert {(layer.in_features, layer.out_features) for layer in layers} >= {(64, 64), (96, 64)}
    for layer in layers:
        part_A, part_B = A[:, : layer.in_features].double(), B[: layer.out_features].double()
        wanted = layer.vera_lambda_b.double().diag() @ part_B @ layer.vera_lambda_d.double().diag() @ part_A
        torch.testing.assert_close(layer.delta_weight().double(), wanted, rtol=0, atol=1e-6)


def test_variant_by_name_is_the_same_thing(build_model, tmp_path):
    plain = minilora.LoraConfig(r=5, target_modules=FAMILIES["llama"], lora_dropout=0.25)
    model = minilora.get_peft_model(build_model("llama"), plain, variant="vera")
    assert model.peft_config["default"] == config(minilora, "llama", vera_dropout=0.25)
    assert model.peft_type == "VERA" and Shown is VeraConfig
    model.save_pretrained(tmp_path)
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is peft.VeraConfig
    read = minilora.LoraConfig.from_pretrained(tmp_path)
    assert isinstance(read, VeraConfig) and (read.r, read.vera_dropout) == (5, 0.25)


# Folders of the time before


@pytest.fixture
def old(build_model, tmp_path, token_ids):
    """``(folder, logits)`` of a VeRA adapter in the layout that minilora had: type LORA, matrices by shape, the variant in the metadata."""
    model = of_before(build_model("llama"), tmp_path / "old", lora_alpha=12, rank_pattern={"v_proj": 3})
    return tmp_path / "old", logits(model, token_ids)


def of_before(model, folder, **fields):
    config = minilora.LoraConfig(r=5, target_modules=FAMILIES["llama"], **fields)
    place(model, config.for_use(), "default", build(model, config, kind="vera"), "vera")
    move(model)
    save_adapter(model, folder)
    return model


def test_old_folder_still_loads_and_saves(build_model, token_ids, old, tmp_path):
    folder, wanted = old
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = minilora.PeftModel.from_pretrained(build_model("llama"), folder)
    layer = layers_of(model)[0]
    assert torch.equal(layer.shared_A, shared_factor(5, 64)) and layer.projections is None
    assert torch.equal(logits(model, token_ids), wanted)
    model.save_pretrained(tmp_path / "again")
    again = minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path / "again")
    assert torch.equal(logits(again, token_ids), wanted)


def test_old_folder_is_not_filled_into_an_adapter_of_today(build_model, tmp_path):
    of_before(build_model("llama"), tmp_path / "old")
    model = minilora.get_peft_model(build_model("llama"), config(minilora, "llama"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(minilora.MiniLoraError, match="its vectors belong to other random matrices"):
        restore_adapter(model, tmp_path / "old")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@every_family
def test_without_a_start_the_update_is_that_of_peft(build_model, family, tmp_path):
    """``init_weights=False``: b of ones and a normal d, drawn layer by layer."""
    ids, models = torch.arange(6)[None], []
    for library, get in ((peft, peft.get_peft_model), (minilora, minilora.get_peft_model)):
        base = build_model(family)
        torch.manual_seed(3)
        models.append(get(base, config(library, family, init_weights=False)).eval())
    theirs, ours = models
    with torch.no_grad():
        wanted, bare = theirs(ids).logits, build_model(family)(ids).logits
        torch.testing.assert_close(ours(ids).logits, wanted, rtol=0, atol=1e-4)
    assert (wanted - bare).abs().max() > 0.01
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["init_weights"] is False
    again = peft.PeftModel.from_pretrained(build_model(family), tmp_path / "ours")
    back = minilora.PeftModel.from_pretrained(build_model(family), tmp_path / "ours")
    with torch.no_grad():
        for model in (again.eval(), back.eval()):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)


# What is refused


def test_fields_that_vera_has_not_are_refused():
    for fields in ({"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"trainable_token_indices": [3]},
                   {"init_lora_weights": "pissa"}, {"use_dora": True}):  # fmt: skip
        with pytest.raises(minilora.MiniLoraError):
            VeraConfig(target_modules=["q_proj"], **fields)
    with pytest.raises(minilora.MiniLoraError, match="init_weights"):
        VeraConfig(init_weights="ones")
    with pytest.raises(minilora.MiniLoraError, match="d_initial"):
        VeraConfig(d_initial=0)


@pytest.mark.parametrize("name", ["LoraConfig", "VeraConfig"])
def test_config_of_peft_is_told_from_ours(build_model, name):
    with pytest.raises(minilora.MiniLoraError, match=f"from minilora.peft import {name}"):
        minilora.get_peft_model(build_model("llama"), getattr(peft, name)(target_modules=["q_proj"]))


@pytest.mark.parametrize("damage", ["missing", "one", "narrow", "rank", "other"])
def test_damaged_matrices_are_refused(build_model, tmp_path, damage):
    model = move(peft.get_peft_model(build_model("llama"), config(peft, "llama")))
    model.save_pretrained(tmp_path)
    file, said = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    if damage in ("missing", "one"):
        del tensors["base_model.vera_A"]
    if damage == "missing":
        del tensors["base_model.vera_B"]
    if damage == "narrow":
        tensors["base_model.vera_A"] = tensors["base_model.vera_A"][:, :80].contiguous()
    if damage == "rank":
        tensors["base_model.vera_B"] = tensors["base_model.vera_B"][:, :4].contiguous()
    if damage == "other":
        tensors["base_model.vera_B"] += 0.01
        said.write_text(json.dumps({**json.loads(said.read_text()), "save_projection": False}))
    save_file(tensors, file, {"format": "pt"})
    base = build_model("llama")
    with pytest.raises(minilora.MiniLoraError, match=r"vera_[AB]"):
        minilora.PeftModel.from_pretrained(base, tmp_path)
    assert not isinstance(base, minilora.PeftModel)


def test_matrices_of_a_file_count_and_not_those_of_the_key(build_model, token_ids, tmp_path):
    theirs = move(peft.get_peft_model(build_model("llama"), config(peft, "llama")))
    with torch.no_grad():
        theirs.base_model.vera_B["default"].mul_(1.5)
    theirs.save_pretrained(tmp_path)
    ours = minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path)
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), rtol=0, atol=5e-6)
    copied = copy.deepcopy(ours)
    copied.save_pretrained(tmp_path / "again")
    assert torch.equal(
        load_file(tmp_path / "again" / "adapter_model.safetensors")["base_model.vera_B"],
        theirs.base_model.vera_B["default"],
    )
    assert read_adapter(tmp_path / "again").variant == "vera"


def test_state_dict_goes_both_ways(build_model, token_ids):
    theirs = move(peft.get_peft_model(build_model("llama"), config(peft, "llama", projection_prng_key=2)))
    ours = minilora.get_peft_model(build_model("llama"), config(minilora, "llama", projection_prng_key=2))
    minilora.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), rtol=0, atol=5e-6)
    other = minilora.get_peft_model(build_model("llama"), config(minilora, "llama"))
    with pytest.raises(minilora.MiniLoraError, match="other random matrices"):
        minilora.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(theirs))


def test_the_trained_parameters_have_the_prefix_of_peft(build_model):
    theirs = peft.get_peft_model(build_model("llama"), config(peft, "llama"))
    ours = minilora.get_peft_model(build_model("llama"), config(minilora, "llama"))
    assert ours.prefix == ours.base_model.prefix == theirs.prefix == "vera_lambda_"
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert trained and all(ours.prefix in name for name in trained)
    plain = minilora.get_peft_model(build_model("llama"), minilora.LoraConfig(target_modules=["q_proj"]))
    assert plain.prefix == "lora_"
