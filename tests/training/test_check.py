"""Every adapted layer is alive, or refused by name before anything has trained."""

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, check_adapter
from minilora.errors import StateError
from minilora.lora.coverage import coverage


def config(*targets, **fields):
    return LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **fields)


class Parts(nn.Module):
    """One of everything: called, never called, thrown away, shut off by a gate of zero."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.lost, self.gated = (nn.Linear(6, 6) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.lost(x)
        return self.used(x) + self.gate * self.gated(x)


class Experts(nn.Module):
    """The second expert sees no input."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dead", "words"),
    [
        ("idle", r"idle of 2 trained layers.*the model does not call it.*exclude_modules=\['idle'\]"),
        ("lost", r"lost of 2 trained layers.*its output does not reach the loss.*exclude_modules=\['lost'\]"),
    ],
)
def test_a_dead_layer_is_named_with_the_way_out(dead, words, snapshot):
    model = minilora.inject(Parts(), config("used", dead))
    before = snapshot(model)
    with pytest.raises(StateError, match=words):
        check_adapter(model, X)
    assert snapshot(model) == before
    assert check_adapter(minilora.inject(Parts(), config("used", dead, exclude_modules=[dead])), X).alive == ("used",)


def test_nothing_is_alive():
    model = minilora.inject(Parts(), config("idle"))
    with pytest.raises(StateError, match="the model does not call it"):
        check_adapter(model, X)


def test_a_gradient_of_zeros_is_told_and_not_refused():
    found = check_adapter(minilora.inject(Parts(), config("used", "gated")), X)
    assert (found.alive, found.zero) == (("used",), ("gated",))
    assert str(found) == "1 adapted layers are alive; 1 got a gradient of zeros, such as gated"


def test_an_expert_without_a_token_is_told_and_not_refused():
    found = check_adapter(minilora.inject(Experts(), config("0", "1")), X)
    assert (found.alive, found.unreached) == (("experts.0",), ("experts.1",))


def test_an_expert_with_a_name_and_a_number_is_one_of_its_kind():
    """As Switch Transformers names them."""
    model = nn.ModuleDict({name: nn.ModuleDict({"up": nn.Linear(6, 6)}) for name in ("expert_0", "expert_1")})
    model.forward = lambda x: model["expert_0"]["up"](x)
    found = check_adapter(minilora.inject(model, config("up")), X)
    assert (found.alive, found.unreached) == (("expert_0.up",), ("expert_1.up",))


def test_layers_whose_own_names_are_numbered_are_no_experts():
    model = nn.ModuleDict({"fc_1": nn.Linear(6, 6), "fc_2": nn.Linear(6, 6)})
    model.forward = lambda x: model["fc_1"](x)
    with pytest.raises(StateError, match=r"fc_2 of 2 trained layers.*the model does not call it"):
        check_adapter(minilora.inject(model, config("fc_1", "fc_2")), X)


def test_a_copy_that_gets_no_gradient_is_refused():
    model = minilora.inject(Parts(), config("used", modules_to_save=["idle"]))
    with pytest.raises(StateError, match=r"idle of 2 trained layers.*take it out of modules_to_save"):
        check_adapter(model, X)


def test_probing_changes_nothing():
    model = minilora.inject(Parts(), config("used", lora_dropout=0.5)).train()
    model.used.lora_B.grad = torch.ones_like(model.used.lora_B)
    state = torch.get_rng_state()
    assert check_adapter(model, [X]).alive == ("used",)
    assert torch.equal(torch.get_rng_state(), state) and model.used.lora_B.grad.eq(1).all()
    assert model.used.lora_A.grad is None and not model.used._forward_pre_hooks and model.training


def test_the_models_own_loss_is_taken_where_there_are_labels(make_llama):
    model, ids = make_llama(), torch.tensor([[3, 1, 4, 1, 5]])
    minilora.get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    for batch in ({"input_ids": ids, "labels": ids}, {"input_ids": ids}):
        assert len(check_adapter(model, batch).alive) == 14
    assert len(check_adapter(torch.compile(model, backend="eager"), batch).alive) == 14


def test_what_would_not_train_at_all_is_refused_first():
    with pytest.raises(StateError, match="no parameter requires grad"):
        check_adapter(minilora.inject(Parts(), config("used")).requires_grad_(False), X)


def test_coverage_counts_all_that_is_multiplied_with():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(6, 2), "mlp": nn.Linear(6, 8), "table": nn.Embedding(9, 6)}
    )
    minilora.inject(model, config("mlp"))
    covered, others = coverage(model)
    assert covered == ["mlp"] and others == ["attention.in_proj_weight", "attention.out_proj"]
