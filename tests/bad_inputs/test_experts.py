"""What is refused of mixtures of experts, each in one line, and the model as it was."""

import pytest
import torch

import minilora
from minilora import LoraConfig, QuantConfig
from minilora.errors import MiniLoraError
from minilora.lora.slots import has_adapters
from tests.models import moe

pytest.importorskip("transformers")


def config(**fields):
    return LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": None} | fields))


def spread():
    model = moe()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    return model


def replaced():
    model = moe()
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda *given: type(experts).forward(experts, *given)
    return model


UP = ["experts.gate_up_proj"]
CASES = {
    "names that match nothing": (
        moe,
        {"target_parameters": ["experts.gate_proj"]},
        "'experts.gate_proj' matches nothing",
        "gate_up_proj",
    ),
    "a name alone": (
        moe,
        {"target_parameters": "experts.down_proj"},
        "target_parameters='experts.down_proj'",
        "write [",
    ),
    "a module of experts": (moe, {"target_modules": ["experts"]}, "is a Qwen3MoeExperts", "target_parameters, such as"),
    "a weight as a module": (moe, {"target_modules": ["gate_up_proj"]}, "is a weight of experts", "target_parameters"),
    "a bias for each": (
        moe,
        {"target_parameters": UP, "lora_bias": True},
        "lora_bias=True is not for experts",
        "set it to False",
    ),
    "vera": (moe, {"target_parameters": UP, "alora_invocation_tokens": [1]}, "which takes dora", "leave it out"),
    "dropout on a router": (
        moe,
        {"target_parameters": ["mlp.gate.weight"], "lora_dropout": 0.1},
        "is a router",
        "wanted 0.0",
    ),
    "spread experts": (spread, {"target_parameters": UP}, "spread over processes", "without a distributed_config"),
    "another forward": (replaced, {"target_parameters": UP}, "was replaced", "del module.forward"),
    "a pattern for nothing": (
        moe,
        {"target_parameters": UP, "rank_pattern": {"down_proj": 1}},
        "'down_proj' matches no adapted",
        "gate_up_proj",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_nothing_has_changed(case):
    make, fields, what, way = CASES[case]
    model = make()
    before, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    with pytest.raises(MiniLoraError) as caught:
        minilora.inject(model, config(**fields))
    said = str(caught.value)
    assert what in said and way in said and "\n" not in said
    assert list(model.state_dict()) == before and [name for name, _ in model.named_modules()] == modules


def test_an_adapter_of_another_number_of_experts_or_rank(tmp_path):
    minilora.save_adapter(minilora.inject(moe(), config(target_parameters=UP)), tmp_path / "a")
    for model in (moe(num_experts=6), moe(num_experts=10)):
        with pytest.raises(MiniLoraError, match=r"another base model|size mismatch"):
            minilora.load_adapter(model, tmp_path / "a", allow_other_base=model.config.num_experts == 6)
        assert not has_adapters(model)


def test_what_cannot_be_packed():
    with pytest.raises(MiniLoraError, match=r"has no packed form"):
        minilora.quantize_model(moe(), None, ["mlp.gate"])
    with pytest.raises(MiniLoraError, match=r"not measured for experts.*target_modules"):
        minilora.quantize_model(moe(), QuantConfig(scale="weighted"), ["experts.down_proj"], {})
    model = moe()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(MiniLoraError, match=r"layers.1.mlp.experts.down_proj.* holds NaN"):
        minilora.quantize_model(model)
    assert type(model.model.layers[0].mlp.experts.gate_up_proj) is torch.nn.Parameter
