"""The product with a quantized weight equals its one-line definition, gradients too, and keeps nothing dense."""

import copy

import pytest
import torch
from torch import nn

from minilora.errors import QuantizationError
from minilora.linear import ops
from minilora.linear.layers import QuantLinear
from minilora.linear.ops import quant_linear, quant_linear_reference
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from tests.compare import saved_bytes

SHAPES = [(48, 80), (7, 200), (5, 33), (1, 64), (130, 65), (1536, 576)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_configs = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def quantized(shape, double=False, blocksize=64):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    return quantize(weight, QuantConfig(blocksize=blocksize, double_quant=double))


def draw(*shape, dtype=torch.float32, seed=1):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def close(got, want, tolerance):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


def compare(weight, x, bias):
    """Outputs and gradients of the operator and of its definition, for one random cotangent."""
    x = x.detach().requires_grad_()
    inputs = (x,) if bias is None else (x, bias)
    got, want = quant_linear(x, weight, bias), quant_linear_reference(x, weight, bias)
    close(got, want, TOLERANCE[x.dtype])
    cotangent = draw(*want.shape, dtype=x.dtype, seed=2).detach()
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent), strict=True
    ):
        close(ours, theirs, TOLERANCE[x.dtype])


@every_dtype
@every_shape
@both_configs
def test_equals_its_definition(shape, dtype, double):
    compare(quantized(shape, double), draw(3, 5, shape[1], dtype=dtype), draw(shape[0], dtype=dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(48, 80), (130, 33), (33, 130), (200, 7)], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64])
def test_slices_of_rows_fit_together(shape, dtype, blocksize, monkeypatch):
    monkeypatch.setattr(ops, "_ROWS", 1)
    weight = quantized(shape, blocksize=blocksize)
    assert sum(1 for _ in ops._row_blocks(weight, torch.float32, 100)) > 1
    compare(weight, draw(6, shape[1], dtype=dtype), draw(shape[0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_rounded_once_and_not_once_a_slice(dtype, monkeypatch):
    monkeypatch.setattr(ops, "_ROWS", 1)
    weight, x = quantized((2048, 64)), draw(4, 64, dtype=dtype)
    cotangent = draw(4, 2048, dtype=dtype, seed=2).detach()
    (got,) = torch.autograd.grad(quant_linear(x, weight), x, cotangent)
    exact = cotangent.double() @ weight.dequantize(torch.float64)
    assert (got.double() - exact).norm() < 0.005 * exact.norm()


@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(lead):
    compare(quantized((48, 80)), draw(*lead, 80), draw(48))


def test_no_rows_give_no_rows():
    x = draw(0, 80)
    out = quant_linear(x, quantized((48, 80)))
    out.sum().backward()
    assert out.shape == (0, 48) and x.grad.shape == (0, 80)


def test_without_bias():
    compare(quantized((7, 200)), draw(4, 200), None)


def test_inputs_and_gradients_need_not_be_contiguous():
    weight, x = quantized((48, 80)), draw(80, 6)
    (got,) = torch.autograd.grad(quant_linear(x.t(), weight).sum(), x)  # the gradient of a sum has stride zero
    (want,) = torch.autograd.grad(quant_linear_reference(x.t(), weight).sum(), x)
    close(got, want, 2e-6)


def test_bias_of_another_dtype_follows_x():
    bias = draw(48, dtype=torch.float32)
    out = quant_linear(draw(4, 80, dtype=torch.bfloat16), quantized((48, 80)), bias)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(bias.grad, torch.full((48,), 4.0))


@pytest.mark.parametrize("double", [False, True])
def test_gradcheck(double):
    weight = quantized((7, 33), double)
    x, bias = draw(2, 33, dtype=torch.float64), draw(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, bias: quant_linear(x, weight, bias), (x, bias))


def test_x_is_left_alone():
    x = draw(4, 80)
    before = x.detach().clone()
    quant_linear(x, quantized((48, 80))).sum().backward()
    assert torch.equal(x, before)


def test_results_are_not_the_reused_buffer():
    weight, x = quantized((48, 80)), draw(4, 80).detach()
    first = quant_linear(x, weight)
    kept = first.clone()
    quant_linear(x + 1, weight)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("shape", [(48, 81), (79,), (80, 48)])
def test_wrong_shapes_name_both(shape):
    with pytest.raises(QuantizationError, match=r"x of shape \(.*\) does not fit a weight of shape \(48, 80\)"):
        quant_linear(torch.ones(shape), quantized((48, 80)))


def test_weight_of_three_dimensions_is_refused():
    with pytest.raises(QuantizationError, match=r"does not fit a weight of shape \(2, 3, 32\)"):
        quant_linear(torch.ones(4, 32), quantized((2, 3, 32)))


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_configs
def test_operator_obeys_the_rules_of_torch(double, dtype, transpose):
    x = draw(4, 66 if transpose else 20, dtype=dtype)
    arguments = (x, *ops._flatten(quantized((20, 66), double)), transpose)
    result = torch.library.opcheck(ops._product, arguments, atol=1e-2, rtol=1e-2)
    assert set(result.values()) == {"SUCCESS"}


@both_configs
def test_compiles_as_one_graph(double):
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(66, 20), QuantConfig(double_quant=double))
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = draw(2, 5, 66), draw(2, 5, 66)
    got, want = compiled(x), twin(y)
    got.square().sum().backward()
    want.square().sum().backward()
    close(got, want, 2e-6)
    close(x.grad, y.grad, 2e-6)
    close(layer.bias.grad, twin.bias.grad, 2e-6)


@both_configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_dense_is_kept_for_backward(double, dtype):
    weight, x, bias = quantized((256, 320), double), draw(4, 320, dtype=dtype), draw(256, dtype=dtype)
    dense = 256 * 320 * x.element_size()
    assert saved_bytes(lambda: quant_linear_reference(x, weight, bias)) >= dense, "the count sees a dense weight"
    assert saved_bytes(lambda: quant_linear(x, weight, bias)) == weight.nbytes
