"""Packed layers of other libraries, by what they say: stand-ins with the names and the two answers that HQQ's and torchao's have."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora import LoraConfig
from minilora.linear.foreign import Foreign, foreign_of, register_foreign
from minilora.linear.layers import dense_weight, is_linear
from minilora.lora.slots import adapters_of

torch.manual_seed(0)
DENSE = torch.randn(24, 40)


class HQQLinear(nn.Module):
    """Named as HQQ's, with its attributes: codes in ``W_q``, ``dequantize()``, ``compute_dtype``."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = 40, 24, torch.float32
        self.W_q = nn.Parameter((DENSE * 20).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.arange(24.0), requires_grad=False)

    def dequantize(self):
        return self.W_q.float() / 20

    def forward(self, x):
        return F.linear(x, self.dequantize(), self.bias)


HQQLinear.__module__ = "hqq.core.quantize"


class AffineWeight(nn.Parameter):
    """A weight that knows its dense values, as torchao's tensors do."""

    def dequantize(self):
        return self.data.round(decimals=1)


AffineWeight.__module__ = "torchao.dtypes.affine"


class AffineLinear(nn.Linear):
    """What torch makes of a product with such a weight."""

    def forward(self, x):
        return F.linear(x, self.weight.dequantize(), self.bias)


def torchao_linear():
    torch.manual_seed(1)
    layer = AffineLinear(40, 24)
    layer.weight = AffineWeight(DENSE, requires_grad=False)
    return layer


class Mine(nn.Module):
    """A layer that nobody knows until it is registered."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.bias = 40, 24, None
        self.weight = nn.Parameter((DENSE * 10).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 10)


MAKERS = [HQQLinear, torchao_linear]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_the_law_merging_and_saving(make, fields, tmp_path):
    model, x = nn.ModuleDict({"layer": make()}).eval(), torch.randn(3, 40)
    base, layer = model["layer"](x), model["layer"]
    assert is_linear(layer) and dense_weight(layer).shape == (24, 40)
    minilora.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **fields))
    adapter = adapters_of(model).named("default")["layer"]
    torch.testing.assert_close(model["layer"](x), base)
    with torch.no_grad():
        adapter.lora_B.normal_()
    want = (
        F.linear(x, layer.dequantize() if make is HQQLinear else layer.weight.dequantize(), layer.bias)
        + x @ adapter.delta_weight().T
    )
    before = model["layer"](x)
    torch.testing.assert_close(before, want, rtol=1e-4, atol=1e-4)
    minilora.save_adapter(model, tmp_path)
    again = nn.ModuleDict({"layer": make()}).eval()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(again["layer"](x), before)
    minilora.merge(model)
    assert type(model["layer"]) is nn.Linear
    torch.testing.assert_close(model["layer"](x), want, rtol=1e-4, atol=1e-4)
    minilora.unmerge(model)
    assert model["layer"].innermost is layer and torch.equal(model["layer"](x), before)


def test_two_layers_without_a_parameter_called_weight_are_not_one():
    model = nn.ModuleDict({"a": HQQLinear(), "b": HQQLinear()}).eval()
    minilora.inject(model, LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
    x = torch.randn(3, 40)
    before = [model[name](x) for name in "ab"]
    minilora.merge(model)
    for name, want in zip("ab", before, strict=True):
        torch.testing.assert_close(model[name](x), want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model["a"].weight, model["b"].weight)


def test_another_library_is_one_line():
    model = nn.ModuleDict({"layer": Mine()})
    assert foreign_of(model["layer"]) is None
    with pytest.raises(minilora.MiniLoraError, match="Mine, which takes no adapter"):
        minilora.inject(model, LoraConfig(target_modules=["layer"]))
    register_foreign(f"{Mine.__module__}.Mine", Foreign(lambda layer: layer.weight.float() / 10, lambda layer: None))
    minilora.inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(3, 40)
    want = model["layer"](x)
    minilora.merge(model)
    torch.testing.assert_close(model["layer"](x), want, rtol=1e-4, atol=1e-4)
