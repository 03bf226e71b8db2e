"""The law of adapters, for every registered variant on every base layer: what is registered is tested."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora.linear.gguf import GGUFLinear
from minilora.linear.layers import QuantLinear, dense_weight
from minilora.lora.adapter import VARIANTS
from minilora.lora.config import LoraConfig
from minilora.lora.inject import place
from minilora.lora.slot import own_parameters
from minilora.quant.config import QuantConfig

pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D

from tests.gguf_blocks import gguf_weight

IN, OUT, R, ALPHA = 96, 25, 4, 12
SCALING = ALPHA / R


def linear(bias=True):
    return nn.Linear(IN, OUT, bias=bias)


def conv1d():
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.weight, std=0.2)
    nn.init.normal_(layer.bias)
    return layer


BASES = {
    "linear": linear,
    "linear_no_bias": lambda: linear(bias=False),
    "conv1d": conv1d,
    "nf4": linear,
    "nf4_double": linear,
    "gguf": linear,
}
PACKED = {"nf4", "nf4_double", "gguf"}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Relative to the largest output; of the half precisions about four roundings.
TOLERANCE = {F32: 1e-5, BF16: 3e-2, F16: 4e-3}

# A variant whose update depends on the input has no ``delta_weight``; it has tests of its own.
every_variant = pytest.mark.parametrize(
    "variant", sorted(name for name in VARIANTS if not VARIANTS[name].depends_on_input)
)
every_base = pytest.mark.parametrize("base", BASES)
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def make_base(kind, dtype=F32):
    torch.manual_seed(5)
    layer = BASES[kind]().to(dtype)
    if kind.startswith("nf4"):
        layer = QuantLinear.from_linear(layer, QuantConfig(double_quant=kind == "nf4_double"))
    if kind == "gguf":
        layer = GGUFLinear(gguf_weight("Q5_1", OUT, IN, dtype=dtype), layer.bias)
    return layer.requires_grad_(False).eval()


def make_adapter(variant, base, **fields):
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"], **fields)
    return VARIANTS[variant](base, config, "layer").eval()


def scatter(adapter, seed=0):
    """Random values in all that trains: a fresh B is zero and would hide a wrong A, scaling or orientation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own_parameters(adapter):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return adapter


def inputs(dtype=F32, *shape):
    return torch.randn(*(shape or (2, 5)), IN, generator=torch.Generator().manual_seed(9), dtype=F64).to(dtype)


def distance(got, want):
    """Largest difference, relative to the largest wanted value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def model_around(adapter, name="default"):
    """A model of one layer that carries this adapter, in whatever variant."""
    model = nn.ModuleDict({"layer": adapter.base_layer})
    model.eval()
    place(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"]), name, {"layer": adapter})
    return model


def bytes_of(module):
    return {name: t.contiguous().reshape(-1).view(torch.uint8).clone() for name, t in module.state_dict().items()}


def same_bytes(module, kept):
    now = bytes_of(module)
    return now.keys() == kept.keys() and all(torch.equal(now[name], kept[name]) for name in kept)


def test_the_lesson_is_registered():
    assert VARIANTS["lora"] is minilora.LoRALinear


@every_variant
@every_base
@every_dtype
def test_identity_at_initialisation(variant, base, dtype):
    layer, x = make_base(base, dtype), inputs(dtype)
    want = copy.deepcopy(layer)(x)
    got = make_adapter(variant, layer)(x)
    assert got.dtype == dtype
    if variant == "loftq" and base not in PACKED:  # replaces its base: near the dense layer, not equal to it
        packed = QuantLinear.from_linear(layer, QuantConfig())
        assert (got - want).double().norm() < (packed(x) - want).double().norm()
    elif variant == "orthogonal":  # B A is zero in exact arithmetic only
        assert distance(got, want) < TOLERANCE[dtype]
    else:
        assert torch.equal(got, want)


@every_variant
@every_base
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_is_dense_weight_plus_delta(variant, base, dtype, rslora):
    layer, x = make_base(base, dtype), inputs(dtype)
    adapter = scatter(make_adapter(variant, layer, use_rslora=rslora))
    delta, layer = adapter.delta_weight(), adapter.innermost
    assert delta.shape == (OUT, IN)
    assert delta.norm() > 0.1 * dense_weight(layer).float().norm(), "too small to notice"
    bias = None if layer.bias is None else layer.bias.double()
    want = F.linear(x.double(), dense_weight(layer).double() + delta.double(), bias)
    got = adapter(x)
    assert got.dtype == dtype and distance(got, want) < TOLERANCE[dtype]


@every_base
@pytest.mark.parametrize(("rslora", "scaling"), [(False, ALPHA / R), (True, ALPHA / R**0.5)])
def test_delta_of_lora_is_scaled_b_times_a(base, rslora, scaling):
    adapter = scatter(make_adapter("lora", make_base(base), use_rslora=rslora))
    want = scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    assert distance(adapter.delta_weight(), want) < 1e-6


def factor_gradients(base):
    """An adapter in float64 and the gradient ``G [out, in]`` that its dense weight would get."""
    adapter = scatter(make_adapter("lora", make_base(base))).double()
    x, cotangent = inputs(F64, 7), torch.randn(7, OUT, generator=torch.Generator().manual_seed(2), dtype=F64)
    (adapter(x) * cotangent).sum().backward()
    return adapter, cotangent.t() @ x


@every_base
def test_gradients_of_the_factors(base):
    adapter, G = factor_gradients(base)
    torch.testing.assert_close(adapter.lora_B.grad, SCALING * G @ adapter.lora_A.t(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.lora_A.grad, SCALING * adapter.lora_B.t() @ G, rtol=1e-10, atol=1e-10)


@every_base
def test_gradients_keep_the_balance_of_the_factors(base):
    adapter, _ = factor_gradients(base)
    left, right = adapter.lora_B.t() @ adapter.lora_B.grad, adapter.lora_A.grad @ adapter.lora_A.t()
    assert left.abs().max() > 1
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@every_base
@pytest.mark.parametrize("r", [1, 3, 7])
def test_rank_of_the_delta_of_lora(base, r):
    config = LoraConfig(r=r, lora_alpha=12, target_modules=["layer"])
    adapter = scatter(VARIANTS["lora"](make_base(base), config, "layer"))
    spectrum = torch.linalg.svdvals(adapter.delta_weight().double())
    assert spectrum[r] < 1e-6 * spectrum[0] < spectrum[r - 1]


@every_variant
@every_base
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_merging_keeps_the_output(variant, base, dtype):
    adapter, x = scatter(make_adapter(variant, make_base(base, dtype))), inputs(dtype)
    model = model_around(adapter)
    before = model["layer"](x)
    minilora.merge(model)
    assert not isinstance(model["layer"], (minilora.Adapter, QuantLinear))
    assert all(p.dtype == dtype and not p.requires_grad for p in model["layer"].parameters())
    assert distance(model["layer"](x), before) < TOLERANCE[dtype]


@every_variant
@every_base
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_unmerging_gives_back_every_bit(variant, base, dtype):
    adapter = scatter(make_adapter(variant, make_base(base, dtype)))
    layer = adapter.innermost
    model, x = model_around(adapter), inputs(dtype)
    kept, before = bytes_of(model), model["layer"](x)
    for _ in range(20):
        minilora.merge(model)
        assert not same_bytes(model, kept)
        minilora.unmerge(model)
    assert same_bytes(model, kept) and torch.equal(model["layer"](x), before)
    assert model["layer"].innermost is layer


@every_variant
@every_base
def test_dropout_is_off_in_eval(variant, base):
    plain, dropping = (scatter(make_adapter(variant, make_base(base), lora_dropout=p)) for p in (0.0, 0.5))
    assert torch.equal(dropping(inputs()), plain(inputs()))
    dropping.train()
    assert not torch.equal(dropping(inputs()), dropping(inputs()))


@every_base
def test_dropout_touches_the_low_rank_path_only(base):
    """Of one-hot rows the update is either gone or whole and scaled up; what the base makes of them never changes."""
    adapter = scatter(make_adapter("lora", make_base(base), lora_dropout=0.25)).train()
    rows = torch.eye(IN).repeat(4, 1)
    update = adapter(rows) - adapter.base_layer(rows)
    whole = adapter.delta_weight().t().repeat(4, 1) / 0.75
    gone = update.abs().amax(1) < 1e-5
    assert 0.12 < gone.sum() / len(rows) < 0.4, "about a quarter of the rows"
    torch.testing.assert_close(update[~gone], whole[~gone], rtol=1e-4, atol=1e-4)


@every_variant
@every_base
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_adapters_are_fp32_whatever_the_base_is(variant, base, dtype):
    adapter = make_adapter(variant, make_base(base, dtype))
    trained = list(own_parameters(adapter))
    assert trained and all(parameter.dtype == F32 and parameter.requires_grad for parameter in trained)
    assert adapter.delta_weight().dtype == F32


@every_variant
@every_base
@every_dtype
def test_training_moves_the_adapter_and_nothing_else(variant, base, dtype):
    layer = make_base(base, dtype).requires_grad_(False)
    if base in ("linear", "linear_no_bias", "conv1d"):
        layer.requires_grad_(True)  # placing an adapter freezes the model
    kept = bytes_of(layer)
    adapter = make_adapter(variant, layer)
    model = model_around(adapter).train()
    start = [parameter.clone() for parameter in own_parameters(adapter)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    x, goal = inputs(dtype, 16), torch.randn(16, OUT).to(dtype)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(model["layer"](x).float(), goal.float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(own_parameters(adapter), start, strict=True))
    assert same_bytes(layer, kept) and all(parameter.grad is None for parameter in layer.parameters())
