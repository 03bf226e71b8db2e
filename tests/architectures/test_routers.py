"""Routers: found by what stands beside them, adapted where they are named and nowhere else, by the law that holds for linear layers."""

import copy

import pytest

pytest.importorskip("transformers")

import torch
from torch import nn

import minilora
from minilora.errors import ConfigError, TargetError
from minilora.linear.experts.routers import routers_among
from minilora.linear.layers import is_linear, is_router, kind_of
from minilora.lora.coverage import coverage
from minilora.lora.match import linear_paths
from minilora.qlora.quantize_model import quantizable_paths
from tests.architectures import batches, checks, tiny

# A name of the router's weight, by model type: a matrix that is read (with a bias, a correction, a function or statistics beside it), a
# Linear by class that computes more, a plain linear layer inside.
NAMES = {
    "mixtral": "mlp.gate.weight",
    "deepseek_v3": "gate.weight",
    "gpt_oss": "router.weight",
    "ernie4_5_moe": "gate.weight",
    "inkling2_text": "gate.weight",
    "muse_spark_text": "gate.weight",
    "jamba": "feed_forward.router.weight",
    "llama4_text": "feed_forward.router.weight",
    "phimoe": "mlp.router.weight",
    "dbrx": "router.layer.weight",
    "jetmoe": "router.layer.weight",
    "afmoe": "router.gate.weight",
    "switch_transformers": "router.classifier.weight",
}
R, ALPHA = 2, 5


def config_of(model_type):
    return minilora.LoraConfig(r=R, lora_alpha=ALPHA, target_parameters=[NAMES[model_type]])


def drawn(model):
    """B at random, so that experts are chosen otherwise than before."""
    generator = torch.Generator().manual_seed(4)
    for adapter in checks.adapters(model).values():
        with torch.no_grad():
            adapter.lora_A.copy_(torch.randn(adapter.lora_A.shape, generator=generator) * 0.3)
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("model_type", NAMES)
def test_the_law_its_gradients_and_a_file(model_type, tmp_path):
    bare = tiny.build(model_type)
    batch = batches.batch_for(bare)
    model = drawn(minilora.inject(copy.deepcopy(bare), config_of(model_type)))
    held = checks.adapters(model)
    routers = routers_among(dict(bare.named_modules()))
    assert held and all(any(path == each or path.startswith(f"{each}.") for each in routers) for path in held)
    scale = ALPHA / R
    updates = {
        path: scale * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
        for path, adapter in held.items()
    }
    dense = checks.with_updates(copy.deepcopy(bare), updates, trains=True)
    wanted = checks.call(dense, batch)
    checks.equal(checks.call(model, batch), wanted, 1e-5, model_type)
    assert checks.far(checks.call(bare, batch), wanted) > 1e-3
    of_weights = checks.gradients(dense, batch, [checks.weight_of(dense, path) for path in held])
    found = checks.gradients(
        model, batch, [part for adapter in held.values() for part in (adapter.lora_A, adapter.lora_B)]
    )
    # Phi-MoE's two choices are each alone in their softmax in some rows, which have no gradient then.
    assert all(whole.any() for whole in of_weights) or model_type == "phimoe"
    for adapter, whole, in_A, in_B in zip(held.values(), of_weights, found[::2], found[1::2], strict=True):
        pairs = (in_A, scale * adapter.lora_B.t() @ whole), (in_B, scale * whole @ adapter.lora_A.t())
        checks.equal([got for got, _ in pairs], [want for _, want in pairs], 1e-3, model_type)
    minilora.save_adapter(model, tmp_path)
    again = copy.deepcopy(bare)
    minilora.load_adapter(again, tmp_path)
    assert all(torch.equal(checks.call(again, batch)[0], other) for other in checks.call(model, batch)[:1])
    minilora.merge(model)
    checks.equal(checks.call(model, batch), wanted, 1e-5, "merged")
    minilora.unload(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in bare.state_dict().items())


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "phimoe"])
def test_peft_reads_the_file(model_type, tmp_path):
    peft = pytest.importorskip("peft")
    bare = tiny.build(model_type)
    batch = batches.batch_for(bare)
    model = drawn(minilora.inject(copy.deepcopy(bare), config_of(model_type)))
    minilora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path))
    checks.equal(checks.call(theirs, batch), checks.call(model, batch), 1e-5, "PEFT")


@pytest.mark.parametrize("model_type", NAMES)
def test_none_is_in_all_linear_and_packing_takes_those_that_are_linear(model_type):
    model = tiny.build(model_type)
    modules = dict(model.named_modules())
    routers = routers_among(modules)
    inside = {path for path in modules if any(f"{path}.".startswith(f"{each}.") for each in routers)}
    assert routers and not inside & set(linear_paths(model))
    plain = {path for path in inside if is_linear(modules[path])}
    assert plain == inside & set(quantizable_paths(model, "all-linear"))
    assert bool(plain) == (model_type in ("dbrx", "jetmoe", "afmoe", "switch_transformers"))
    _, others = coverage(minilora.inject(model, minilora.LoraConfig(target_modules="all-linear")))
    assert all(any(other.startswith(each) for other in others) for each in routers)


def test_one_that_is_adapted_counts_as_covered():
    for model_type in ("mixtral", "llama4_text", "dbrx"):
        model = minilora.inject(tiny.build(model_type), config_of(model_type))
        covered, others = coverage(model)
        assert len(covered) == len(checks.adapters(model)) and not set(covered) & set(others)


def test_a_packed_linear_router_is_adapted_as_any_packed_layer():
    bare = minilora.quantize_model(tiny.build("dbrx"))
    batch = batches.batch_for(tiny.build("dbrx"))
    model = drawn(minilora.inject(copy.deepcopy(bare), config_of("dbrx")))
    assert all(isinstance(adapter.innermost, minilora.QuantLinear) for adapter in checks.adapters(model).values())
    assert checks.far(checks.call(model, batch), checks.call(bare, batch)) > 1e-3


def test_what_cannot_be_done_is_refused_before_anything_has_changed():
    model = tiny.build("mixtral")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        TargetError, match=r"layers\.0\.mlp\.gate: MixtralTopKRouter has no packed form; quantize linear layers"
    ):
        minilora.quantize_model(model, target_modules=["gate"])
    with pytest.raises(ConfigError, match=r"is a router, whose weight is read and not called: lora_dropout=0\.1"):
        minilora.inject(model, minilora.LoraConfig(lora_dropout=0.1, target_parameters=["gate.weight"]))
    for layer in model.model.layers:  # as another library's codes would lie
        layer.mlp.gate.weight = nn.Parameter(layer.mlp.gate.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"layers\.0\.mlp\.gate: the weight of a router is uint8, packed.*; give the dense model"
    ) as said:
        minilora.inject(model, minilora.LoraConfig(target_parameters=["gate.weight"]))
    assert "\n" not in str(said.value) and not checks.adapters(model)
    rest = {key: value for key, value in model.state_dict().items() if not key.endswith("gate.weight")}
    assert all(torch.equal(value, state[key]) for key, value in rest.items())


class Block(nn.Module):
    """A mixture as models wrote it before transformers 5: a linear layer chooses among single layers."""

    def __init__(self):
        super().__init__()
        self.gate, self.shared_gate = nn.Linear(6, 3, bias=False), nn.Linear(6, 1)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))


class ForgetGate(nn.Module):
    """No router: no experts stand beside it."""

    def __init__(self):
        super().__init__()
        self.f_proj = nn.Linear(6, 6)


def test_a_router_is_what_stands_beside_experts():
    model = nn.ModuleDict({"moe": Block(), "gate": nn.Linear(6, 6), "forget": ForgetGate()})
    assert routers_among(dict(model.named_modules())) == {"moe.gate"}
    assert linear_paths(model) == [
        "moe.shared_gate", *(f"moe.experts.{n}" for n in range(3)), "gate", "forget.f_proj"
    ]  # fmt: skip
    named = minilora.inject(model, minilora.LoraConfig(target_modules=["gate"]))
    assert set(checks.adapters(named)) == {"moe.gate", "gate"}


def test_a_class_that_is_called_a_router_and_holds_layers_is_none_itself():
    class TopKGate(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.weight, self.part = nn.Parameter(torch.ones(3, 5)), inside

    class PlainRouter(nn.Linear):
        pass

    class OwnRouter(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    assert is_router(TopKGate(nn.SiLU())) and not is_router(TopKGate(nn.Linear(5, 3)))
    assert kind_of(PlainRouter(5, 3)) == "linear" and kind_of(OwnRouter(5, 3)) == "router"
