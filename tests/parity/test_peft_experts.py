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
    assert lost == any("PEFT 0.21 will not load" in str(each.message) for each in said)
    assert lost == (targets not in (["k_proj"], ["kv_b_proj"]))
