"""LoRA on experts and routers beside PEFT: counts, start values, files in both directions, files of the time when experts were layers."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import minilora
from tests.mixtures import expert_layers, mixture, old_folder
from tests.models import randomize

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
IGNORED = (
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
    "ignore:.*is_gradient_checkpointing:FutureWarning",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(got, want):
    torch.testing.assert_close(logits(got), logits(want), atol=2e-5, rtol=1e-5)


def before_mixtral(path):
    return path.replace(".mlp.", ".block_sparse_moe.")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_old_files_load_as_in_peft_and_come_back_from_it(tmp_path, kind, whole):
    model, rename = mixture(kind), before_mixtral if kind == "mixtral" else str
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    layers = expert_layers(model, names, rename)
    if whole:
        linear = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"}
        routers = {rename(p): m for p, m in model.named_modules() if p.endswith("mlp.gate")}
        layers |= {path: tuple(module.weight.shape) for path, module in (linear | routers).items()}
    old_folder(tmp_path / "old", layers, target_modules="all-linear" if whole else list(names))
    ours, theirs = copy.deepcopy(model), peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "old")
    minilora.load_adapter(ours, tmp_path / "old")
    assert (logits(ours) - logits(model)).abs().max() > 0.1
    close(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")  # its config has a rank for the expression .*\.gate_up_proj
    again = copy.deepcopy(model)
    minilora.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    minilora.save_adapter(ours, tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours"), ours)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize(
    "targets", [["gate_proj", "up_proj", "down_proj"], r".*shared_experts\.down_proj", ["k_proj", "kv_b_proj"]]
)
def test_what_peft_would_lose_is_said_when_it_is_saved(tmp_path, kind, targets):
    model = mixture(kind)
    if not isinstance(targets, str):
        targets = [name for name in targets if any(path.endswith(name) for path, _ in model.named_modules())]
    ours = copy.deepcopy(model)
    minilora.inject(ours, minilora.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    randomize(ours)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        minilora.save_adapter(ours, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "saved")
    lost = (logits(theirs) - logits(ours)).abs().max() > 1e-3
    assert lost == any("PEFT 0.21 does not load" in str(each.message) for each in said)
    assert lost == (targets not in (["k_proj"], ["kv_b_proj"]))


NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
CHOICES = (NAMES, NAMES[1:2], ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"])


def both(kind, names, seed=5, **fields):
    """The same adapter in minilora and in PEFT, each drawn after one seed."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": names, **fields}
    made = []
    for wrapped, config in ((minilora.get_peft_model, minilora.LoraConfig), (peft.get_peft_model, peft.LoraConfig)):
        model = mixture(kind)
        torch.manual_seed(seed)
        made.append(wrapped(model, config(task_type="CAUSAL_LM", **fields)))
    return made


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("names", CHOICES, ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_names_counts_start_values_and_updates(capsys, kind, names, init):
    ours, theirs = both(kind, names, init_lora_weights=init)
    ours.print_trainable_parameters(), theirs.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key, tensor in other.items():
        assert torch.equal(mine[key], tensor), key
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    assert ours.targeted_parameter_names == theirs.base_model.targeted_parameter_names
    assert ours.targeted_module_names == theirs.base_model.targeted_module_names
    said, wanted = minilora.peft.get_layer_status(ours), peft.get_layer_status(theirs)
    assert [(s.name, s.module_type, s.requires_grad) for s in said] == [
        (s.name, s.module_type, s.requires_grad) for s in wanted
    ]
    randomize(theirs)
    minilora.peft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    found, wanted = minilora.peft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    close(ours, theirs)
    ours.merge_adapter(), theirs.merge_adapter()
    mine, other = ours.state_dict(), theirs.state_dict()
    for key, tensor in other.items():
        torch.testing.assert_close(mine[key], tensor, atol=1e-6, rtol=1e-6)
    ours.unmerge_adapter(), theirs.unmerge_adapter()
    with ours.disable_adapter(), theirs.disable_adapter():
        close(ours, theirs)


@pytest.mark.parametrize("names", CHOICES, ids=str)
def test_gradients_and_files_in_both_directions(tmp_path, names):
    ours, theirs = both("qwen3_moe", names)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if parameter.requires_grad:
            held = wanted[key].grad
            entry = ours.get_submodule(key.removesuffix(".weight"))
            laid = entry.adapter.to_file(entry.attribute, parameter.grad) if parameter.dim() == 3 else parameter.grad
            torch.testing.assert_close(laid, held, atol=2e-5, rtol=1e-4)
    ours.eval().save_pretrained(tmp_path / "ours"), theirs.eval().save_pretrained(tmp_path / "theirs")
    close(ours, peft.PeftModel.from_pretrained(mixture("qwen3_moe"), tmp_path / "ours"))
    close(minilora.PeftModel.from_pretrained(mixture("qwen3_moe"), tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str)
def test_what_peft_saves_of_names_that_it_takes_for_experts(tmp_path, names):
    theirs = randomize(peft.get_peft_model(mixture(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mixture()
    minilora.load_adapter(ours, tmp_path / "theirs")
    close(ours, theirs)
