"""Experts of each kind alone, with odd sizes, in several dtypes, and with rows that belong to no expert.

What is right is the class's own loop over experts (transformers' "eager") with ``W + s B A`` in its weights.
"""

import copy

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import minilora
from minilora.linear.experts.known import projections
from minilora.linear.experts.layers import QuantExperts
from tests.architectures import checks, tiny

E, H, INNER, T, K = 5, 22, 35, 13, 2
FIELDS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), H),
    **{"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.7, "swiglu_limit": 7.0, "zero_expert_num": 2},
    **{
        "n_shared_experts": 3,
        "moe_latent_size": None,
        "mlp_bias": False,
        "post_norm_eps": 1e-6,
        "ffn_act_fn": {"name": "silu"},
    },
}


def config():
    made = transformers.PretrainedConfig()
    for name, value in FIELDS.items():
        setattr(made, name, value)
    made._experts_implementation = "eager"
    return made


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(last=E):
    """The experts of each token and their weights; expert 3 gets none."""
    index = torch.randint(0, last, (T, K), generator=torch.Generator().manual_seed(2))
    index[:, 1] = (index[:, 0] + 1 + index[:, 1] % (last - 1)) % last
    return torch.where(index == 3, 4, index), draw(T, K, seed=3).softmax(-1)


class Whole(nn.Module):
    """Experts with what a router would say of their tokens."""

    def __init__(self, experts, call):
        super().__init__()
        self.experts, self.call = experts, call

    def forward(self, x):
        return self.call(self.experts, x)


def of_all(experts, x):
    return experts(x, *chosen())


def blocks(experts, x):
    index, weights = chosen()
    return experts(x.unsqueeze(0), index, weights.to(x.dtype)).squeeze(0)


def sized(experts, x):
    sizes = [4, 0, 3, 1, 5]
    return experts(x, sizes)


def scored(experts, x):
    scores = torch.zeros(E, T).scatter(0, chosen()[0].t(), chosen()[1].t())
    return experts((x.unsqueeze(0) * scores.unsqueeze(2).to(x.dtype)).view(-1, H)).view(E, T, H).sum(0)


KINDS = {
    "usual": (Qwen3MoeExperts, lambda kind: kind(config()), of_all),
    "transposed, interleaved, biased": (GptOssExperts, lambda kind: kind(config()), of_all),
    "no gate": (NemotronHExperts, lambda kind: kind(config()), of_all),
    "a norm behind": (MuseSparkExperts, lambda kind: kind(config()), of_all),
    "flat": (DbrxExperts, lambda kind: kind(config()), blocks),
    "one projection": (JetMoeParallelExperts, lambda kind: kind(E, H, INNER), sized),
    "scores before": (Llama4TextExperts, lambda kind: kind(config()), scored),
    "experts that do nothing": (LongcatFlashExperts, lambda kind: kind(config()), lambda experts, x: experts(x, *chosen(E + 2))),
    "clamped": (Step3p7Experts, lambda kind: kind(config(), swiglu_limit=0.4), of_all),
    "all of them": (InklingSharedExperts, lambda kind: kind(config()), lambda experts, x: experts(x, draw(T, 3, seed=5).to(x.dtype))),
}  # fmt: skip


def whole(kind, dtype=torch.float32):
    cls, make, call = KINDS[kind]
    return tiny.drawn(Whole(make(cls), call).eval()).to(dtype)


CONFIG = minilora.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")


def adapted(model, seed=5):
    minilora.inject(model, CONFIG)
    for number, adapter in enumerate(checks.adapters(model).values()):
        with torch.no_grad():
            adapter.lora_A.copy_(draw(*adapter.lora_A.shape, seed=seed + number) * 0.3)
            adapter.lora_B.copy_(draw(*adapter.lora_B.shape, seed=seed + 50 + number) * 0.3)
    return model


def twin(model, bare):
    """The class's own loop, with the updates in its weights."""
    updates = {
        path: adapter.scaling * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
        for path, adapter in checks.adapters(model).items()
    }
    return checks.with_updates(copy.deepcopy(bare), updates, trains=True)


# bf16 experts run in bf16 in the class's loop, and are rounded after each product there as here.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_law_and_its_gradients(kind, dtype):
    bare = whole(kind, dtype)
    model = adapted(copy.deepcopy(bare))
    dense = twin(model, bare)
    x, goal = draw(T, H, seed=9).to(dtype), draw(T, INNER if kind == "one projection" else H, seed=10).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, wanted = model(inputs[0]), dense(inputs[1])
    assert found.dtype == wanted.dtype
    checks.equal([found], [wanted], CLOSE[dtype], kind)
    (found * goal).sum().backward()
    (wanted * goal).sum().backward()
    checks.equal([inputs[0].grad], [inputs[1].grad], 3 * CLOSE[dtype], "inputs")
    for path, adapter in checks.adapters(model).items():
        home, name = checks.place_of(dense, path)
        a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
        grad = checks.unturned(home, home._parameters[name].grad, b @ a).double()[: len(a)]
        wanted_A, wanted_B = adapter.scaling * b.mT @ grad, adapter.scaling * grad @ a.mT
        checks.equal([adapter.lora_A.grad, adapter.lora_B.grad], [wanted_A, wanted_B], 3 * CLOSE[dtype], path)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_computes_what_the_decoded_weights_do(kind):
    bare = whole(kind)
    model = minilora.quantize_model(copy.deepcopy(bare), minilora.QuantConfig("nf4", 64))
    dense = copy.deepcopy(bare)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantExperts):
            home, name = checks.place_of(dense, path)
            kept = checks.turned(home, home._parameters[name], layer.quantized().dequantize())
            setattr(home, name, nn.Parameter(kept, requires_grad=False))
            assert not torch.equal(kept, checks.weight_of(bare, path))
    x = draw(T, H, seed=9)
    checks.equal([model(x)], [dense(x)], 1e-5, kind)
    adapted(model)
    checks.equal([model(x)], [twin(model, dense)(x)], 1e-5, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_back_to_the_bit(kind):
    bare, x = whole(kind), draw(T, H, seed=9)
    model = adapted(copy.deepcopy(bare))
    wanted, plain = model(x), bare(x)
    minilora.merge(model)
    assert not checks.adapters(model)
    checks.equal([model(x)], [wanted], 1e-5, kind)
    minilora.unmerge(model)
    assert torch.equal(model(x), wanted)
    minilora.unload(model)
    assert torch.equal(model(x), plain) and list(model.state_dict()) == list(bare.state_dict())


@pytest.mark.parametrize("kind", ["usual", "a norm behind", "clamped"])
def test_an_index_behind_the_last_expert_adds_nothing(kind):
    index, weights = chosen()
    index[::3, 0], index[5] = E, E
    bare = whole(kind)
    bare.call = lambda experts, x: experts(x, index, weights)
    model = adapted(copy.deepcopy(bare))
    x = draw(T, H, seed=9).requires_grad_()
    found = model(x)
    checks.equal([found], [twin(model, bare)(x)], 1e-5, kind)
    assert not found[5].any()
    found.square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[5].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_projections_are_views_of_the_parameters(kind):
    experts = whole(kind).experts
    home = experts.mlp if kind == "flat" else experts
    for name, layer in projections(home).items():
        assert layer.weight is home._parameters[name]
        assert layer.in_features != layer.out_features or kind == "all of them"
    assert "experts" not in dict(Whole(experts, None).named_parameters())
