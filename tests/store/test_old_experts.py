"""Files of the time when experts were single layers, on today's models: against the same updates added by hand."""

import copy

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

import minilora
from minilora.errors import CheckpointError
from minilora.store.load import restore_adapter
from tests.mixtures import add_by_hand, expert_layers, mixture, old_folder
from tests.models import randomize

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
NAMES = ("gate_proj", "up_proj", "down_proj")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(model, folder, **fields):
    plain = copy.deepcopy(model)
    minilora.load_adapter(plain, folder, **fields)
    return plain


def before_mixtral(path):
    return path.replace(".mlp.", ".block_sparse_moe.")


def test_every_expert_and_the_attention(tmp_path):
    model = mixture()
    layers = expert_layers(model) | {f"model.layers.{at}.self_attn.q_proj": (32, 32) for at in (0, 1)}
    factors = old_folder(tmp_path / "old", layers, target_modules=["q_proj", *NAMES])
    want = add_by_hand(copy.deepcopy(model), factors, lambda path: 6 / 4)
    got = loaded(model, tmp_path / "old")
    assert (logits(want) - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(logits(got), logits(want), atol=2e-5, rtol=1e-4)


def test_the_update_is_the_same_to_the_last_bit(tmp_path):
    model = mixture()
    factors = old_folder(tmp_path / "old", expert_layers(model), target_modules=list(NAMES), dtype=torch.bfloat16)
    model = loaded(model, tmp_path / "old")
    held = minilora.lora.slots.adapters_of(model).named("default")
    gate_up = held["model.layers.1.mlp.experts.gate_up_proj"]
    A, B = (factors["model.layers.1.mlp.experts.4.up_proj"][at].float() for at in (0, 1))
    assert (gate_up.r, gate_up.scaling) == (8, 1.5)
    assert torch.equal(gate_up.lora_A[4, 4:], A)
    assert torch.equal(gate_up.lora_B[4, 20:, 4:], B)
    assert not gate_up.lora_B[:, :20, 4:].any()
    assert not gate_up.lora_B[:, 20:, :4].any()


@pytest.mark.parametrize(
    "targets", [["w1", "w2", "w3"], r".*\.experts\.\d+\.w\d", "all-linear", ["gate", "w1", "w2", "w3"]]
)
def test_mixtral_under_its_old_names(tmp_path, targets):
    model = mixture("mixtral")
    layers = expert_layers(model, ("w1", "w3", "w2"), before_mixtral)
    attention = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    if targets == "all-linear":
        layers |= {f"model.layers.{at}.self_attn.{name}": shape for at in (0, 1) for name, shape in attention.items()}
    if "gate" in targets or targets == "all-linear":
        layers |= {f"model.layers.{at}.block_sparse_moe.gate": (4, 32) for at in (0, 1)}
    factors = old_folder(tmp_path / "old", layers, target_modules=targets, use_rslora=True)
    renamed = {path.replace("block_sparse_moe.gate", "mlp.gate"): pair for path, pair in factors.items()}
    want = add_by_hand(copy.deepcopy(model), renamed, lambda path: 6 / 4**0.5, ("w1", "w3", "w2"), before_mixtral)
    torch.testing.assert_close(logits(loaded(model, tmp_path / "old")), logits(want), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("targets", [list(NAMES), r".*\.(gate|up|down)_proj"])
def test_dense_layers_of_the_same_names_keep_theirs(tmp_path, kind, targets):
    model = mixture(kind)
    linear = {
        p: tuple(m.weight.shape)
        for p, m in model.named_modules()
        if p.endswith(NAMES) and isinstance(m, torch.nn.Linear)
    }
    assert {p.split(".")[-2] for p in linear} == {"mlp", "shared_experts"}
    factors = old_folder(tmp_path / "old", linear | expert_layers(model), target_modules=targets)
    want = add_by_hand(copy.deepcopy(model), factors, lambda path: 6 / 4)
    torch.testing.assert_close(logits(loaded(model, tmp_path / "old")), logits(want), atol=5e-5, rtol=1e-4)


def test_experts_without_a_gate(tmp_path):
    model = mixture("nemotron_h")
    layers = expert_layers(model, (None, "up_proj", "down_proj"))
    factors = old_folder(tmp_path / "old", layers, target_modules=r".*experts\.\d+\.(up|down)_proj")
    want = add_by_hand(copy.deepcopy(model), factors, lambda path: 6 / 4)
    torch.testing.assert_close(logits(loaded(model, tmp_path / "old")), logits(want), atol=5e-5, rtol=1e-4)


def test_other_ranks_and_alphas_are_padded_and_folded(tmp_path):
    model = mixture()
    layers = {
        p: (*s, 2 if p.endswith(".3.gate_proj") else 4) for p, s in expert_layers(model).items() if ".5." not in p
    }
    patterns = {"rank_pattern": {"experts.3.gate_proj": 2}, "alpha_pattern": {"up_proj": 10}}
    factors = old_folder(tmp_path / "old", layers, target_modules=r".*experts\.[0-4]\.\w+", **patterns)
    assert not any(".5." in path for path in factors)
    scaling = {"gate_proj": 6 / 4, "up_proj": 10 / 4, "down_proj": 6 / 4}
    want = add_by_hand(
        copy.deepcopy(model), factors, lambda p: 6 / 2 if p.endswith(".3.gate_proj") else scaling[p.rpartition(".")[2]]
    )
    torch.testing.assert_close(logits(loaded(model, tmp_path / "old")), logits(want), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("only", [("gate_proj", None, None), (None, "up_proj", "down_proj")])
def test_half_of_gate_and_up_is_the_half_that_it_is(tmp_path, only):
    model = mixture()
    factors = old_folder(tmp_path / "old", expert_layers(model, only), target_modules=[name for name in only if name])
    want = add_by_hand(copy.deepcopy(model), factors, lambda path: 6 / 4)
    torch.testing.assert_close(logits(loaded(model, tmp_path / "old")), logits(want), atol=2e-5, rtol=1e-4)


def test_saved_again_it_is_a_file_of_today(tmp_path):
    model = mixture()
    old_folder(tmp_path / "old", expert_layers(model), target_modules=list(NAMES))
    first = loaded(model, tmp_path / "old", is_trainable=True)
    minilora.save_adapter(first, tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"].shape == (6 * 8, 32)
    assert torch.equal(logits(loaded(model, tmp_path / "new")), logits(first))


def test_resuming_and_exchanging_take_old_files_too(tmp_path):
    model = mixture()
    old_folder(tmp_path / "old", expert_layers(model), target_modules=list(NAMES))
    factors = old_folder(tmp_path / "other", expert_layers(model), target_modules=list(NAMES), seed=9)
    want = logits(loaded(model, tmp_path / "other"))
    assert (want - logits(add_by_hand(copy.deepcopy(model), factors, lambda path: 6 / 4))).abs().max() < 1e-4
    first = loaded(model, tmp_path / "old")
    minilora.hotswap_adapter(first, tmp_path / "other")
    assert torch.equal(logits(first), want)
    second = loaded(model, tmp_path / "old")
    restore_adapter(second, tmp_path / "other")
    assert torch.equal(logits(second), want)


def refusal(model, folder):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        minilora.load_adapter(model, folder)
    assert not minilora.lora.slots.has_adapters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_experts_cannot_take_over_is_refused_by_name(tmp_path):
    model = mixture()
    layers = expert_layers(model)
    hole = {path: shape for path, shape in layers.items() if path != "model.layers.1.mlp.experts.2.up_proj"}
    old_folder(tmp_path / "hole", hole, target_modules=list(NAMES))
    assert "model.layers.1.mlp.experts.2.up_proj is missing" in refusal(model, tmp_path / "hole")
    old_folder(
        tmp_path / "more", layers | {"model.layers.0.mlp.experts.6.up_proj": (20, 32)}, target_modules=list(NAMES)
    )
    assert "experts.6.up_proj: model.layers.0.mlp.experts.gate_up_proj has 6 experts" in refusal(
        model, tmp_path / "more"
    )
    old_folder(
        tmp_path / "wide", layers | {"model.layers.0.mlp.experts.1.up_proj": (21, 32)}, target_modules=list(NAMES)
    )
    assert "experts.1.up_proj has lora_A [4, 32] and lora_B [21, 4]" in refusal(model, tmp_path / "wide")
    old_folder(
        tmp_path / "name", layers | {"model.layers.0.mlp.experts.1.mid": (20, 32)}, target_modules=[*NAMES, "mid"]
    )
    assert "model.layers.0.mlp.experts.1.mid: these experts have no such layer" in refusal(model, tmp_path / "name")
    old_folder(tmp_path / "dora", layers, target_modules=list(NAMES), use_dora=True)
    assert "with dora adapters" in refusal(model, tmp_path / "dora")
    old_folder(tmp_path / "rank", layers, target_modules=list(NAMES), rank_pattern={"up_proj": 5})
    assert "config and model want [5, 32] and [20, 5]" in refusal(model, tmp_path / "rank")


@pytest.mark.parametrize("modules", [None, ["o_proj"], r".*\.o_proj"])
def test_linear_layers_that_target_parameters_names_come_back_from_a_file(tmp_path, modules):
    model = mixture()
    names = ["0.self_attn.q_proj.weight", "1.mlp.experts.down_proj"]
    ours = copy.deepcopy(model)
    minilora.inject(ours, minilora.LoraConfig(r=3, lora_alpha=12, target_modules=modules, target_parameters=names))
    randomize(ours)
    minilora.save_adapter(ours, tmp_path / "saved")
    assert torch.equal(logits(loaded(model, tmp_path / "saved")), logits(ours))
    assert (logits(ours) - logits(model)).abs().max() > 0.1
