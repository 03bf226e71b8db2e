"""Layers: packed storage that nothing can cast, and one owner of which way round a weight lies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora.errors import QuantizationError, TargetError
from minilora.linear.layers import (
    QuantLinear,
    compute_dtype,
    dense_weight,
    in_out_features,
    is_conv1d,
    is_linear,
    is_quantized,
    with_weight,
)
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.quant.config import QuantConfig
from tests.compare import same

IN, OUT = 33, 20
PACKED = {"weight", "absmax", "nested_absmax", "nested_offset"}
both_configs = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def linear(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT).to(dtype)


def conv1d(dtype=torch.float32, seed=0):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN)
    torch.manual_seed(seed)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def packed(dtype=torch.float32, double=False, seed=0):
    return QuantLinear.from_linear(linear(dtype, seed), QuantConfig(double_quant=double))


BASES = {"linear": linear, "conv1d": conv1d, "quantized": packed}
every_base = pytest.mark.parametrize("build", BASES.values(), ids=BASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def x_of(dtype=torch.float32):
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def state(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@both_configs
def test_all_but_the_bias_is_frozen_uint8(double):
    parameters = dict(packed(double=double).named_parameters())
    storage = PACKED if double else {"weight", "absmax"}
    assert parameters.keys() == storage | {"bias"}
    assert all(parameters[name].dtype == torch.uint8 and not parameters[name].requires_grad for name in storage)
    assert not list(packed(double=double).buffers())


@both_configs
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_storage_survives_every_cast(double, cast):
    layer = packed(double=double)
    before, dense = state(layer), dense_weight(layer)
    layer.to(cast)
    assert all(same({n: t}, {n: before[n]}) for n, t in layer.state_dict().items() if n != "bias")
    assert layer.bias.dtype == cast
    assert layer.weight.dtype == compute_dtype(layer) == cast and torch.equal(dense_weight(layer), dense.to(cast))
    out = layer(x_of(cast))
    assert out.dtype == cast
    torch.testing.assert_close(out.double(), F.linear(x_of(cast).double(), dense.double(), layer.bias.double()),
                               rtol=2e-2, atol=2e-2)  # fmt: skip


@both_configs
def test_state_dict_round_trip(double):
    source, target = packed(double=double, seed=1), packed(double=double, seed=2)
    assert not torch.equal(source(x_of()), target(x_of()))
    target.load_state_dict(source.state_dict(), strict=True)
    assert same(source.state_dict(), target.state_dict()) and torch.equal(source(x_of()), target(x_of()))


@both_configs
def test_deepcopy_shares_no_memory(double):
    layer = packed(double=double)
    twin, before = copy.deepcopy(layer), layer(x_of())
    assert torch.equal(twin(x_of()), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x_of()), before) and not torch.equal(twin(x_of()), before)
    assert all(not p.requires_grad for name, p in twin.named_parameters() if name != "bias")


@both_configs
def test_quantized_is_a_view_of_the_storage(double):
    layer = packed(double=double)
    view = layer.quantized()
    assert view.packed.data_ptr() == layer.codes.data_ptr() and view.absmax.data_ptr() == layer.absmax.data_ptr()
    assert (view.absmax.dtype == torch.uint8) is double
    assert view.shape == (OUT, IN) and view.blocksize == 64


@every_dtype
@pytest.mark.parametrize("dense", [linear, conv1d], ids=["linear", "conv1d"])
def test_from_linear_quantizes_out_by_in_and_keeps_the_bias(dense, dtype):
    layer = dense(dtype)
    got = QuantLinear.from_linear(layer, QuantConfig())
    assert in_out_features(got) == (IN, OUT) and compute_dtype(got) == dtype
    assert got.bias is layer.bias
    assert (dense_weight(got).float() - dense_weight(layer).float()).abs().max() < 0.153 * layer.weight.abs().max()


def test_from_linear_names_the_layer_it_refuses():
    layer = linear()
    layer.weight.data[2, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"decoder\.fc\.weight holds NaN"):
        QuantLinear.from_linear(layer, QuantConfig(), "decoder.fc.weight")


def test_repr_shows_sizes_and_exact_bits():
    layer = QuantLinear.from_linear(nn.Linear(64, 32, bias=False), QuantConfig())
    assert repr(layer) == "QuantLinear(in_features=64, out_features=32, bias=False, nf4, 4.500 bits)"


@every_base
@every_dtype
def test_dense_weight_is_out_by_in(build, dtype):
    layer = build(dtype)
    weight = dense_weight(layer)
    assert weight.shape == (OUT, IN) and weight.dtype == dtype == compute_dtype(layer) and not weight.requires_grad
    want = F.linear(x_of(dtype).float(), weight.float(), layer.bias.float())
    torch.testing.assert_close(layer(x_of(dtype)).float(), want, rtol=2e-2, atol=2e-2)


@every_base
def test_in_out_features(build):
    assert in_out_features(build()) == (IN, OUT)
    adapter = LoRALinear(build(), LoraConfig(r=3, lora_alpha=12))
    assert in_out_features(adapter) == (IN, OUT)


@every_base
@every_dtype
def test_with_weight_is_a_new_frozen_layer(build, dtype):
    layer = build(dtype).eval()
    before, weight = state(layer), torch.randn(OUT, IN).to(dtype)
    new = with_weight(layer, weight)
    assert torch.equal(dense_weight(new), weight) and not new.weight.requires_grad
    assert new.bias is layer.bias and not new.training
    assert in_out_features(new) == (IN, OUT) and is_conv1d(new) == is_conv1d(layer) and not is_quantized(new)
    torch.testing.assert_close(
        new(x_of(dtype)).float(),
        F.linear(x_of(dtype).float(), weight.float(), layer.bias.float()),
        rtol=2e-2, atol=5e-2,
    )  # fmt: skip
    new.train()
    with torch.no_grad():
        new.weight.zero_()
    assert same(state(layer), before) and not layer.training


@every_base
def test_with_weight_takes_another_bias(build):
    layer, bias = build(), torch.arange(OUT, dtype=torch.float32)
    before = state(layer)
    new = with_weight(layer, dense_weight(layer), bias)
    assert torch.equal(new.bias, bias) and not new.bias.requires_grad
    assert same(state(layer), before)
    torch.testing.assert_close(new(x_of()) - layer(x_of()), (bias - layer.bias).expand(3, -1))


def test_with_weight_without_bias_has_none():
    layer = nn.Linear(IN, OUT, bias=False)
    assert with_weight(layer, torch.zeros(OUT, IN)).bias is None


@pytest.mark.parametrize("call", [in_out_features, dense_weight])
@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.ConvTranspose1d(4, 6, 3), nn.Sequential()])
def test_other_modules_are_refused_by_name(call, module):
    with pytest.raises(TargetError, match=f"{type(module).__name__} is not a linear layer; wanted Linear, Conv1D"):
        call(module)


def test_torch_conv1d_is_not_the_gpt2_layer():
    assert not is_conv1d(nn.Conv1d(4, 6, 1)) and not is_linear(nn.Conv1d(4, 6, 1))


@every_base
def test_is_linear_and_is_quantized(build):
    assert is_linear(build()) and is_quantized(build()) is (build is packed)
