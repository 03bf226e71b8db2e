"""Where PEFT 0.21.2 is silently wrong: what it does, what minilora does, and what the mathematics says in float64.

Each test computes PEFT's result now. Where the installed PEFT does right, its half of the test is skipped, with the reason.
"""

import concurrent.futures
import copy
import json
import threading

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import minilora
from minilora.linear.layers import dense_weight
from minilora.report.inspect import adapters_in
from tests.models import standing

# PEFT reads the orientation of a layer from its config and says so when it has to correct the config.
CONV1D = "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
pytestmark = pytest.mark.filterwarnings(CONV1D)

PREFIX = "base_model.model."
SOME = ["q_proj", "down_proj"]
PATH = "model.layers.0.self_attn.q_proj"
WRONG = 1e-3  # a difference that no rounding in fp32 makes on these models


def wrap(library, model, name="default", seed=11, **fields):
    """``model`` with one more adapter; the first is active, the others are kept aside."""
    config = {"r": 4, "lora_alpha": 12, "target_modules": SOME, "task_type": "CAUSAL_LM", **copy.deepcopy(fields)}
    torch.manual_seed(seed)
    if hasattr(model, "peft_config"):
        model.add_adapter(name, library.LoraConfig(**config))
        return model
    return library.get_peft_model(model, library.LoraConfig(**config), adapter_name=name)


def disturb(model, size=0.1):
    """Move what trains by noise that depends on its name in an adapter file: equal in both libraries."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = key.removeprefix(PREFIX).replace(".default", "").replace(".two", "").replace(".three", "")
                generator = torch.Generator().manual_seed(sum(map(ord, key.removesuffix(".weight"))) % 997)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def pair(model, **fields):
    return tuple(disturb(wrap(library, copy.deepcopy(model), **fields)).eval() for library in (minilora, peft))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def distance(found, wanted):
    """Largest difference over the largest wanted value."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def assert_exact(found, wanted, tolerance=1e-5):
    assert distance(found, wanted) < tolerance


def assert_peft_is_wrong(found, wanted, least=WRONG):
    """The claim about PEFT; a PEFT that has become right skips the rest, which would claim otherwise."""
    if distance(found, wanted) < 1e-5:
        pytest.skip("this PEFT is right here")
    assert distance(found, wanted) > least


def exact_logits(base, deltas, ids):
    """Logits in float64 of ``base`` with the updates ``[out, in]`` added to the weights at their paths."""
    model = copy.deepcopy(base).double()
    with torch.no_grad():
        for path, delta in deltas.items():
            weight = model.get_submodule(path).weight
            weight.add_(
                delta
                if weight.shape == delta.shape and "Conv1D" not in str(type(model.get_submodule(path)))
                else delta.T
            )
    return logits(model, ids)


def deltas_in_double(model, name="default", weight=1.0):
    """``weight * s B A`` in float64 by path, from the factors of minilora's adapters."""
    return {
        path: weight * value.scaling * (value.lora_B.detach().double() @ value.lora_A.detach().double())
        for path, value in adapters_in(model, name).items()
    }


@pytest.fixture
def llama(build_model):
    return build_model("llama").eval()


@pytest.fixture
def gpt2(build_model):
    return build_model("gpt2", tied=False).eval()


# Names


def adapted(model):
    found = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")}
    return {name.removeprefix(PREFIX) for name in found}


@pytest.mark.parametrize(
    ("field", "names", "typo"),
    [
        ("target_modules", ["q_proj", "v_porj"], "v_porj"),
        ("target_modules", ["q_proj", "layers.7.mlp.up_proj"], "layers.7.mlp.up_proj"),
        ("modules_to_save", ["lm_head", "nrom"], "nrom"),
    ],
)
def test_1959_a_typo_among_several_names_is_silent(llama, field, names, typo):
    theirs = wrap(peft, copy.deepcopy(llama), **{field: names})  # a warning would be an error here
    assert adapted(theirs) and not any(typo.split(".")[-1] in name for name in adapted(theirs) if "up_proj" not in typo)
    with pytest.raises(minilora.MiniLoraError, match=f"(?s){typo}.*closest"):
        wrap(minilora, llama, **{field: names})
    assert not minilora.lora.slots.has_adapters(llama)


def test_3693_an_index_out_of_range_in_layers_to_transform_is_silent(llama):
    theirs = wrap(peft, copy.deepcopy(llama), layers_to_transform=[1, 7])
    assert adapted(theirs) and all(".1." in name for name in adapted(theirs))
    with pytest.raises(minilora.MiniLoraError, match=r"layers_to_transform: 7.*layers 0 to 1"):
        wrap(minilora, llama, layers_to_transform=[1, 7])


def test_2155_layers_to_transform_on_a_bare_llama_model(llama):
    bare = llama.model
    with pytest.raises(ValueError, match="not found"):
        wrap(peft, copy.deepcopy(bare), layers_to_transform=[1], task_type=None)
    ours = wrap(minilora, copy.deepcopy(bare), layers_to_transform=[1], task_type=None)
    assert adapted(ours) == {"layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"}


def test_modules_to_save_matches_a_fragment_of_a_name(llama):
    theirs = wrap(peft, copy.deepcopy(llama), modules_to_save=["head"])
    assert any("lm_head.modules_to_save" in name for name, p in theirs.named_parameters() if p.requires_grad)
    ours = wrap(minilora, llama, modules_to_save=["head"])
    assert any("lm_head" in name for name, p in ours.named_parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:Adapter name 'self_attn' should not be:UserWarning")
def test_3584_an_adapter_called_like_a_module_makes_another_one_save_nothing(llama, token_ids, tmp_path):
    ours, theirs = pair(llama, target_modules=["q_proj"])
    expected = logits(ours, token_ids)
    for name, library, model in (("ours", minilora, ours), ("theirs", peft, theirs)):
        wrap(library, model, "self_attn", target_modules=["q_proj"])
        model.save_pretrained(tmp_path / name)
    assert len(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == 4
    assert len(load_file(tmp_path / "ours" / "self_attn" / "adapter_model.safetensors")) == 4
    loaded = minilora.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours")
    assert torch.equal(logits(loaded, token_ids), expected)
    saved = len(load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    if saved == 4:
        pytest.skip("this PEFT saves the adapter whole")
    assert saved == 0


# A second time


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_second_get_peft_model_resets_what_was_trained(llama, token_ids):
    ours, theirs = pair(llama)
    trained = logits(ours, token_ids)
    assert distance(trained, logits(llama, token_ids)) > WRONG
    # PEFT wraps the same layers and draws the adapter of that name again; it warns of a second time, not of the loss.
    again = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=SOME, task_type="CAUSAL_LM"))
    with pytest.raises(minilora.MiniLoraError, match="already"):
        minilora.get_peft_model(ours, minilora.LoraConfig(r=4, lora_alpha=12, target_modules=SOME))
    assert torch.equal(logits(ours, token_ids), trained)
    if distance(logits(again, token_ids), trained) < 1e-5:
        pytest.skip("this PEFT keeps the adapter")
    assert_exact(logits(again, token_ids), logits(llama, token_ids))


# Files


@pytest.fixture
def folder(llama, tmp_path):
    """A trained adapter, saved by minilora; without the seal that would refuse every change at once."""
    disturb(wrap(minilora, copy.deepcopy(llama))).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "minilora.json").unlink()
    return tmp_path / "adapter"


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_unexpected_tensors_in_a_file_are_silent(llama, folder, token_ids):
    key = PREFIX + "model.layers.0.self_attn.v_proj.lora_B.weight"
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(32, 4)}))
    peft.PeftModel.from_pretrained(copy.deepcopy(llama), folder)  # a warning would be an error here
    with pytest.raises(minilora.MiniLoraError, match=r"v_proj.lora_B.weight is unexpected"):
        minilora.PeftModel.from_pretrained(llama, folder)
    assert not minilora.lora.slots.has_adapters(llama)


def test_a_dora_file_whose_config_says_lora_loads_as_something_else(llama, token_ids, tmp_path):
    ours = disturb(wrap(minilora, copy.deepcopy(llama), use_dora=True)).eval()
    expected = logits(ours, token_ids)
    ours.save_pretrained(tmp_path)
    (tmp_path / "minilora.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    with pytest.raises(minilora.MiniLoraError, match="lora_magnitude_vector"):
        minilora.PeftModel.from_pretrained(llama, tmp_path)
    assert_peft_is_wrong(logits(theirs, token_ids), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_randomized_pissa_file_reloads_to_another_model(request, token_ids, tmp_path, family):
    """The start that is subtracted from the weights comes from a random projection, which nothing keeps in PEFT."""
    base, results = request.getfixturevalue(family), {}
    fields = {"init_lora_weights": "pissa_niter_2", "target_modules": "all-linear"}
    for name, library in (("ours", minilora), ("theirs", peft)):
        model = disturb(wrap(library, copy.deepcopy(base), **fields)).eval()
        model.save_pretrained(tmp_path / name)
        plain = copy.deepcopy(base)
        torch.manual_seed(999)
        loaded = library.PeftModel.from_pretrained(plain, tmp_path / name)
        results[name] = distance(logits(loaded, token_ids), logits(model, token_ids))
    assert results["theirs"] > WRONG
    assert results["ours"] < 1e-5


# Exchange in place


@pytest.mark.parametrize("patterns", [{"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"down_proj": 3}}])
def test_3738_hotswap_ignores_rank_pattern_in_the_scaling(llama, token_ids, tmp_path, patterns):
    source = disturb(wrap(minilora, copy.deepcopy(llama), **patterns)).eval()
    source.save_pretrained(tmp_path)
    expected = exact_logits(llama, deltas_in_double(source), token_ids)
    ours, theirs = pair(llama)
    ours.hotswap_adapter(tmp_path)
    assert_exact(logits(ours, token_ids), expected)
    try:
        hotswap_adapter(theirs, str(tmp_path), adapter_name="default")
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"this PEFT refuses it: {error}")
    assert_peft_is_wrong(logits(theirs, token_ids), expected)


@pytest.mark.parametrize("name", ["two", "b", "self"])
@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix:UserWarning")
def test_3780_hotswap_zeroes_adapters_whose_names_it_finds_in_others(llama, folder, token_ids, name):
    """Not named in the file means zeroed, and PEFT looks for the name anywhere in a parameter's path."""
    changed = {}
    for library, model in zip((minilora, peft), pair(llama), strict=True):
        before = logits(model, token_ids)
        wrap(library, model, name)
        if library is minilora:
            model.hotswap_adapter(folder, name)
        else:
            hotswap_adapter(model, str(folder), adapter_name=name)
        changed[library.__name__] = distance(logits(model, token_ids), before)
    assert changed["minilora"] == 0
    if name == "two":  # a name that is nowhere else
        assert changed["peft"] == 0
    elif changed["peft"] == 0:
        pytest.skip("this PEFT leaves the other adapter alone")


def test_3581_a_file_saved_after_a_hotswap_has_the_old_scaling(llama, token_ids, tmp_path):
    source = disturb(wrap(minilora, copy.deepcopy(llama), lora_alpha=40)).eval()
    source.save_pretrained(tmp_path / "source")
    expected = exact_logits(llama, deltas_in_double(source), token_ids)
    ours, theirs = pair(llama)
    ours.hotswap_adapter(tmp_path / "source")
    hotswap_adapter(theirs, str(tmp_path / "source"), adapter_name="default")
    reloaded = []
    for name, library, model in (("ours", minilora, ours), ("theirs", peft, theirs)):
        assert_exact(logits(model, token_ids), expected)
        model.save_pretrained(tmp_path / name)
        reloaded.append(library.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / name))
    assert_exact(logits(reloaded[0], token_ids), expected)
    assert_peft_is_wrong(logits(reloaded[1], token_ids), expected)


# Weighted sums


def two(model, **fields):
    """Both libraries' models with adapters "default" and "two", both trained; "default" is active."""
    made = []
    for library, one in zip((minilora, peft), pair(model, **fields), strict=True):
        wrap(library, one, "two", seed=12, **fields)
        one.set_adapter("two")
        disturb(one, 0.15)
        one.set_adapter("default")
        made.append(one.eval())
    return made


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_3761_rslora_svd_scale_is_too_large_by_the_root_of_the_rank(llama, token_ids, combination):
    ours, theirs = two(llama, use_rslora=True)
    exact = deltas_in_double(ours, "default", 0.6)
    for path, delta in deltas_in_double(ours, "two", 0.3).items():
        exact[path] = exact[path] + delta
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "two"], [0.6, 0.3], "new", combination, svd_rank=8)
    for path, value in adapters_in(ours, "new").items():
        assert_exact(value.delta_weight().detach(), exact[path])
    layer = theirs.base_model.model.get_submodule(PATH)
    wrong = layer.get_delta_weight("new").detach()
    assert_peft_is_wrong(wrong, exact[PATH])
    assert_exact(wrong, 8**0.5 * exact[PATH])
    ours.set_adapter("new")
    assert_exact(logits(ours, token_ids), exact_logits(llama, exact, token_ids))


def dora_weight(weight, layer):
    """DoRA's merged weight in float64: every row of ``W + s B A`` brought to its magnitude."""
    moved = weight.double() + layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    return layer.lora_magnitude_vector.detach().double()[:, None] * moved / moved.norm(dim=1, keepdim=True)


def test_weighted_adapters_ignore_the_magnitudes_of_dora(llama, token_ids):
    """One adapter with weight 1 should be that adapter. Its update has full rank, so minilora refuses."""
    ours, theirs = two(llama, use_dora=True)
    exact = {}
    for path, layer in adapters_in(ours).items():
        weight = dense_weight(layer.innermost)
        exact[path] = dora_weight(weight, layer) - weight.double()
    expected = exact_logits(llama, exact, token_ids)
    assert_exact(logits(ours, token_ids), expected)
    assert_exact(logits(theirs, token_ids), expected)
    with pytest.raises(minilora.MiniLoraError, match="DoRA"):
        ours.add_weighted_adapter(["default"], [1.0], "new", "cat")
    assert set(ours.peft_config) == {"default", "two"}
    try:
        theirs.add_weighted_adapter(["default"], [1.0], "new", "cat")
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"this PEFT refuses it: {error}")
    theirs.set_adapter("new")
    assert_peft_is_wrong(logits(theirs, token_ids), expected)


# Switching and merging


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_3756_merging_one_of_two_active_adapters_drops_the_other(request, token_ids, family):
    base = request.getfixturevalue(family)
    ours, theirs = two(base, target_modules=SOME if family == "llama" else ["c_attn", "c_fc"])
    ours.set_adapter(["default", "two"])
    theirs.base_model.set_adapter(["default", "two"])
    exact = deltas_in_double(ours, "default")
    for path, delta in deltas_in_double(ours, "two").items():
        exact[path] = exact[path] + delta
    expected = logits(ours, token_ids)
    assert_exact(expected, logits(theirs, token_ids))
    if family == "llama":
        assert_exact(expected, exact_logits(base, exact, token_ids))
    for model in (ours, theirs):
        model.merge_adapter(["default"])
    assert_exact(logits(ours, token_ids), expected)
    assert_peft_is_wrong(logits(theirs, token_ids), expected)


def test_3447_disabling_unfreezes_a_frozen_adapter(llama, folder):
    counts = {}
    for library in (minilora, peft):
        model = library.PeftModel.from_pretrained(copy.deepcopy(llama), folder)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with model.disable_adapter():
            pass
        counts[library.__name__] = sum(parameter.requires_grad for parameter in model.parameters())
    assert counts["minilora"] == 0
    if not counts["peft"]:
        pytest.skip("this PEFT leaves it frozen")
    assert counts["peft"] == 8


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
def test_deleting_the_active_adapter_leaves_different_ones_active_in_different_layers(llama, token_ids):
    """Each layer of PEFT takes the first adapter that it has itself, and the model reports that of its first layer."""
    seen = {}
    for library, model in zip((minilora, peft), pair(llama), strict=True):
        for name, targets, seed in (("two", ["q_proj"], 3), ("three", ["down_proj"], 4)):
            wrap(library, model, name, seed, target_modules=targets, init_lora_weights=False)
        model.eval()
        model.delete_adapter("default")
        reported = list(model.active_adapters)
        found = logits(model, token_ids)
        model.set_adapter(reported[0])
        seen[library.__name__] = (reported, distance(found, logits(model, token_ids)))
    assert seen["minilora"][1] == 0
    if seen["peft"][1] < 1e-5:
        pytest.skip("this PEFT activates one adapter everywhere")
    assert seen["peft"][1] > WRONG


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.filterwarnings("ignore:(?s)Model with `tie_word_embeddings=True` and the tied_target_modules:UserWarning")
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_2018_merging_into_a_tied_head_changes_the_output(build_model, token_ids):
    """The head's update lands in the embedding too. minilora refuses, and merges after the head got a weight of its own."""
    base = build_model("gpt2", tied=True).eval()
    ours, theirs = pair(base, target_modules=["lm_head"])
    expected = logits(ours, token_ids)
    assert_exact(logits(theirs, token_ids), expected)
    with pytest.raises(minilora.MiniLoraError, match=r"shares its weight with transformer\.wte"):
        ours.merge_and_unload()
    assert torch.equal(logits(ours, token_ids), expected)
    minilora.untie(ours)
    assert_exact(logits(ours.merge_and_unload(), token_ids), expected)
    assert_peft_is_wrong(logits(theirs.merge_and_unload(), token_ids), expected)


def test_1388_a_round_trip_of_merging_in_bf16_leaves_other_weights(build_model):
    base = build_model("llama", torch.bfloat16).eval()
    before = base.get_submodule(PATH).weight.clone()
    drift = {}
    for library in (minilora, peft):
        model = disturb(wrap(library, copy.deepcopy(base)))
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
        drift[library.__name__] = (model.unload().get_submodule(PATH).weight - before).float().abs().max().item()
    assert drift["minilora"] == 0
    if drift["peft"] == 0:
        pytest.skip("this PEFT puts the weights back")
    assert drift["peft"] > 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_disabling_a_residual_start_does_not_give_the_base(llama, token_ids, init):
    """PEFT subtracts the start from the base weights, so a disabled adapter leaves a hole in them."""
    ours, theirs = pair(llama, init_lora_weights=init)
    expected = logits(llama, token_ids)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours, token_ids), expected)
        assert_peft_is_wrong(logits(theirs, token_ids), expected)


# OLoRA on GPT-2's layers


def test_olora_on_conv1d_gives_factors_that_do_not_fit(gpt2, token_ids):
    expected = exact_logits(gpt2, {}, token_ids)
    ours = wrap(minilora, copy.deepcopy(gpt2), target_modules=["c_attn"], init_lora_weights="olora")
    assert_exact(logits(ours, token_ids), expected)
    theirs = wrap(peft, copy.deepcopy(gpt2), target_modules=["c_attn"], init_lora_weights="olora")
    lora_A = theirs.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].weight
    if lora_A.shape == (4, 16):
        pytest.skip("this PEFT turns the weight round")
    with pytest.raises(RuntimeError, match="shape"):
        logits(theirs, token_ids)


def test_olora_on_a_square_conv1d_silently_starts_from_another_model(gpt2, token_ids):
    expected = exact_logits(gpt2, {}, token_ids)
    fields = {"target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}
    assert_exact(logits(wrap(minilora, copy.deepcopy(gpt2), **fields), token_ids), expected)
    assert_peft_is_wrong(logits(wrap(peft, copy.deepcopy(gpt2), **fields), token_ids), expected)


# Four bits


@pytest.fixture
def in_four_bits():
    """``in_four_bits(model)``: PEFT's and bitsandbytes' way, every linear layer of the blocks as a Linear4bit."""
    bnb = pytest.importorskip("bitsandbytes")

    def convert(model):
        model = copy.deepcopy(model)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                packed = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4",
                    compress_statistics=False, compute_dtype=torch.float32,
                )  # fmt: skip
                packed.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
                )
                packed.bias = layer.bias
                parent, _, attr = path.rpartition(".")
                setattr(model.get_submodule(parent), attr, packed.to("cpu"))
        model.is_loaded_in_4bit = True
        return model

    return convert


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations:UserWarning")
def test_2321_merging_into_four_bits_erases_a_small_update(llama, in_four_bits):
    ours = minilora.quantize_model(copy.deepcopy(llama))
    ours, theirs = disturb(wrap(minilora, ours), 0.01), disturb(wrap(peft, in_four_bits(llama)), 0.01)
    layer = adapters_in(ours)[PATH]
    delta = deltas_in_double(ours)[PATH]
    start = dense_weight(layer.innermost).double()
    assert 0 < delta.norm() < 0.05 * start.norm()
    report = ours.merge_adapter()
    merged = dense_weight(standing(ours, PATH)).double()
    assert (merged - start - delta).norm() < 1e-4 * delta.norm()
    assert report.survived > 0.999 and "float32" in report.into
    module = theirs.base_model.model.get_submodule(PATH)
    dense = peft.utils.integrations.dequantize_bnb_weight
    before = dense(module.base_layer.weight, state=module.base_layer.weight.quant_state).double()
    theirs.merge_adapter()
    after = dense(module.base_layer.weight, state=module.base_layer.weight.quant_state).double()
    assert (before - start).norm() < 1e-5 * start.norm()  # the same four bits in both libraries
    lost = ((after - before - delta).norm() / delta.norm()).item()
    if lost < 0.1:
        pytest.skip("this PEFT merges into a dense layer")
    assert lost > 0.5, "more than half of the update is rounding error"


def test_2321_asked_to_requantize_minilora_says_how_much_is_lost(llama):
    model = disturb(wrap(minilora, minilora.quantize_model(llama)), 0.01)
    starts = {path: dense_weight(layer.innermost).double() for path, layer in adapters_in(model).items()}
    deltas = deltas_in_double(model)
    report = model.merge_adapter(requantize=True)
    assert report.into == "nf4"
    for path, survived in report.layers.items():
        error = (dense_weight(standing(model, path)).double() - starts[path] - deltas[path]).norm()
        assert survived == pytest.approx(max(0.0, 1 - (error / deltas[path].norm()).item()), abs=1e-3)
    assert report.survived < 0.5


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations:UserWarning")
def test_3741_lora_bias_is_merged_unscaled_into_four_bits(llama, in_four_bits):
    fields = {"target_modules": ["q_proj"], "lora_bias": True}
    ours = disturb(wrap(minilora, minilora.quantize_model(copy.deepcopy(llama)), **fields))
    theirs = disturb(wrap(peft, in_four_bits(llama), **fields))
    layer = adapters_in(ours)[PATH]
    bias = layer.innermost.bias.detach().double().clone()
    exact = bias + layer.scaling * layer.lora_bias.detach().double()
    assert (exact - bias).norm() > WRONG
    ours.merge_adapter()
    assert_exact(ours.get_submodule(PATH).bias.detach(), exact)
    theirs.merge_adapter()
    assert_peft_is_wrong(theirs.base_model.model.get_submodule(PATH).base_layer.bias.detach(), exact)


# Threads


def run_crosswise(first, second, layer):
    """Results of both calls, run in two threads so that each is inside ``layer`` while the other passes through it."""
    order = {"first": threading.Event(), "second": threading.Event(), "done": threading.Event()}
    who = threading.local()

    def gate(module, inputs):
        if who.name == "first":
            order["first"].set()
            order["second"].wait(10)  # the second call has begun and is inside the model
        else:
            order["second"].set()
            order["done"].wait(10)  # the first call has ended

    def call(name, function):
        who.name = name
        if name == "second":
            order["first"].wait(10)
        try:
            return function()
        finally:
            order["done" if name == "first" else "second"].set()

    handle = layer.register_forward_pre_hook(gate)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(call, "first", first), pool.submit(call, "second", second)]
            return [future.exception(30) or future.result(30) for future in calls]
    finally:
        handle.remove()


def test_threads_that_mix_adapters_get_each_their_own(llama, token_ids):
    ours, theirs = two(llama)
    alone = [logits(ours, token_ids, adapter_names=[name] * 2) for name in ("default", "two")]
    assert distance(*alone) > WRONG

    def calls(model):
        return [lambda name=name: logits(model, token_ids, adapter_names=[name] * 2) for name in ("default", "two")]

    found = run_crosswise(*calls(ours), ours.model.layers[1])
    assert all(torch.equal(one, wanted) for one, wanted in zip(found, alone, strict=True))
    found = run_crosswise(*calls(theirs), theirs.base_model.model.model.layers[1])
    if all(
        isinstance(one, torch.Tensor) and distance(one, wanted) < 1e-5 for one, wanted in zip(found, alone, strict=True)
    ):
        pytest.skip("this PEFT keeps the rows of threads apart")


def test_switching_during_a_mixed_batch_is_refused_where_peft_answers_with_two_adapters(llama, token_ids):
    """A server's request and another thread's set_adapter: in PEFT the layers after the switch compute with the other one."""
    ours, theirs = two(llama)
    expected = logits(ours, token_ids, adapter_names=["default"] * 2)
    found, refused = run_crosswise(
        lambda: logits(ours, token_ids, adapter_names=["default"] * 2),
        lambda: ours.set_adapter("two"),
        ours.model.layers[1],
    )
    assert torch.equal(found, expected)
    assert isinstance(refused, minilora.MiniLoraError) and "change the adapters after it" in str(refused)
    assert ours.active_adapters == ["default"]
    assert_exact(logits(ours, token_ids), expected)
    assert [parameter.requires_grad for parameter in adapters_in(ours, "two")[PATH].parameters()].count(True) == 0
    found, _ = run_crosswise(
        lambda: logits(theirs, token_ids), lambda: theirs.set_adapter("two"), theirs.base_model.model.model.layers[1]
    )
    assert_peft_is_wrong(found, expected)


CHANGES = {
    "set_adapter": lambda model: model.set_adapter("two"),
    "delete_adapter": lambda model: model.delete_adapter("two"),
    "delete the active": lambda model: model.delete_adapter("default"),
    "merge_adapter": lambda model: model.merge_adapter(["two"]),
    "unload": lambda model: model.unload(),
}
ADDITIONS = {
    "add_adapter": lambda model: wrap(minilora, model, "new"),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "new", "cat"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_adapters_during_a_mixed_batch_is_refused_and_changes_nothing(llama, token_ids, change):
    ours, _ = two(llama)
    rows = ["two", "default"]
    before = logits(ours, token_ids), logits(ours, token_ids, adapter_names=rows)
    trains = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    with ours.batch_adapters(rows):
        with pytest.raises(minilora.MiniLoraError, match="batch that mixes adapters"):
            change(ours)
        assert torch.equal(logits(ours, token_ids), before[1])
    assert set(ours.peft_config) == {"default", "two"} and ours.active_adapters == ["default"]
    assert torch.equal(logits(ours, token_ids), before[0])
    assert torch.equal(logits(ours, token_ids, adapter_names=rows), before[1])
    assert [name for name, parameter in ours.named_parameters() if parameter.requires_grad] == trains


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_what_is_added_aside_during_a_mixed_batch_changes_nothing_of_it(llama, token_ids, add):
    ours, _ = two(llama)
    rows = ["two", "default"]
    before = logits(ours, token_ids), logits(ours, token_ids, adapter_names=rows)
    with ours.batch_adapters(rows):
        add(ours)
        assert torch.equal(logits(ours, token_ids), before[1])
    assert set(ours.peft_config) == {"default", "two", "new"} and ours.active_adapters == ["default"]
    assert torch.equal(logits(ours, token_ids), before[0])
    assert torch.equal(logits(ours, token_ids, adapter_names=rows), before[1])


def test_many_threads_with_batches_of_their_own_never_meet(llama, token_ids):
    ours, _ = two(llama)
    names = [["default", "two"], ["two", "default"], ["__base__", "two"], ["default", "__base__"]]
    wanted = [logits(ours, token_ids, adapter_names=each) for each in names]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(logits, ours, token_ids, adapter_names=each) for _ in range(10) for each in names]
        found = [call.result(60) for call in calls]
    assert all(torch.equal(one, wanted[place % 4]) for place, one in enumerate(found))
    assert not torch.equal(wanted[0], wanted[1])
