"""A layer over GGUF's blocks: its product, its gradients and its adapter are those of the decoded weight, and its bytes the file's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora.errors import QuantizationError
from minilora.linear import cuda, ops
from minilora.linear.frozen import PackedLinear
from minilora.linear.fused import lora_linear, lora_linear_reference
from minilora.linear.gguf import GGUFLinear
from minilora.linear.layers import (
    QuantLinear,
    carries,
    compute_dtype,
    dense_weight,
    frozen_weight,
    in_out_features,
    is_linear,
    is_ours,
    is_quantized,
    pack,
    packed_like,
    product,
    with_weight,
)
from minilora.linear.ops import dequantize, quant_linear, quant_linear_reference
from minilora.linear.stacked import Part, stacked_linear, stacked_linear_reference
from minilora.quant.config import QuantConfig
from tests.compare import same, saved_bytes
from tests.gguf_blocks import KINDS, gguf_weight
from tests.linear.test_fused import close, compare, draw

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
ROWS, R = 13, 3

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def weight_of(kind, rows=ROWS, blocks=None, dtype=torch.float32):
    """Three blocks a row of the short ones, one of the long ones."""
    size = 256 if kind.endswith("_K") else 32
    return gguf_weight(kind, rows, size * (blocks or (1 if size == 256 else 3)), dtype=dtype)


def layer_of(kind="Q4_1", dtype=torch.float32, bias=True, rows=ROWS):
    held = nn.Parameter(draw(rows, dtype=dtype, seed=2, grad=False)) if bias else None
    return GGUFLinear(weight_of(kind, rows, dtype=dtype), held)


def x_of(layer, dtype=torch.float32, lead=(4,)):
    return draw(*lead, layer.in_features, dtype=dtype, grad=False)


# ---- the products


@every_kind
@every_dtype
def test_product_and_gradients_are_the_formulas(kind, dtype):
    weight, bias = weight_of(kind), draw(ROWS, dtype=dtype, seed=2)
    x = draw(3, 5, weight.shape[1], dtype=dtype)
    got, want = quant_linear(x, weight, bias), quant_linear_reference(x, weight, bias)
    close(got, want, TOLERANCE[dtype])
    cotangent = draw(*want.shape, dtype=dtype, seed=3, grad=False)
    pairs = zip(*(torch.autograd.grad(out, (x, bias), cotangent) for out in (got, want)), strict=True)
    for ours, theirs in pairs:
        close(ours, theirs, TOLERANCE[dtype])


@every_kind
def test_slices_of_rows_fit_together(kind, monkeypatch):
    monkeypatch.setattr(ops, "_ROWS", 1)
    weight = weight_of(kind, 7)
    assert sum(1 for _ in ops._row_blocks(weight, torch.float32, 100)) == 7, "a row at a time"
    compare(weight, factors(weight), 0.3)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_the_adapted_layer_is_its_formula(kind, dtype, p):
    weight = weight_of(kind)
    compare(weight, factors(weight, dtype), p)


def factors(weight, dtype=torch.float32):
    """x, bias, A, B."""
    rows, columns = weight.shape
    x, bias = draw(2, 5, columns, dtype=dtype), draw(rows, dtype=dtype, seed=2)
    return [x, bias, draw(R, columns, seed=3), draw(rows, R, seed=4)]


@pytest.mark.parametrize("kind", ["Q5_1", "Q6_K"])
def test_gradcheck(kind):
    weight = weight_of(kind, 5)
    x, bias, A, B = (part.detach().double().requires_grad_() for part in factors(weight))
    assert torch.autograd.gradcheck(
        lambda *inputs: lora_linear(inputs[0], weight, *inputs[1:], 2.5), (x[:1, :1], bias, A, B)
    )


@every_kind
def test_runs_that_share_a_weight(kind):
    weight, x = weight_of(kind), draw(6, weight_of(kind).shape[1])
    _, _, A, B = factors(weight)
    runs = [Part(slice(0, 2), A, B, 2.5), Part(torch.tensor([5, 3]), draw(R, weight.shape[1], seed=8), B, 0.5)]
    got, want = stacked_linear(x, weight, None, runs), stacked_linear_reference(x, weight, None, runs, [None] * 2)
    close(got, want, 4e-6)
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), (x, A, B)) for out in (got, want)), strict=True):
        close(ours, theirs, 1e-5)


@every_kind
def test_nothing_dense_is_kept_for_backward(kind):
    weight = weight_of(kind, 200)
    x, bias, A, B = factors(weight)
    assert saved_bytes(lambda: quant_linear(x, weight, bias)) == weight.nbytes
    kept = saved_bytes(lambda: lora_linear(x, weight, bias, A, B, 2.5), [x, A, B, bias])
    assert kept == weight.nbytes + 4 * R * 10
    assert saved_bytes(lambda: lora_linear_reference(x, weight, bias, A, B, 2.5), [x, A, B, bias]) > 4 * A.numel()


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_operators_obey_the_rules_of_torch(kind, transpose):
    weight = weight_of(kind)
    arguments = (draw(4, weight.shape[1] if transpose else ROWS), *ops._flatten(weight), transpose)
    assert set(torch.library.opcheck(ops._product, arguments).values()) == {"SUCCESS"}
    dense = (*ops._flatten(weight), torch.bfloat16)
    assert set(torch.library.opcheck(ops._dense, dense).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_compiles_as_one_graph(kind):
    layer = layer_of(kind)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (layer(x), layer.weight), fullgraph=True, backend="aot_eager")
    x = x_of(layer).requires_grad_()
    out, weight = compiled(x)
    close(out, layer(x), 2e-6)
    assert torch.equal(weight, layer.quantized().dequantize())
    (got,), (want,) = (torch.autograd.grad(each.square().sum(), x) for each in (out, layer(x)))
    close(got, want, 2e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torch_func_sees_the_product():
    layer = layer_of("Q5_0")
    x, dense = x_of(layer), dense_weight(layer)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer(row)))(x)
    torch.testing.assert_close(jacobian, dense.expand(4, -1, -1))
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), dense))


@every_kind
def test_the_kernels_do_not_take_them(kind):
    weight = weight_of(kind)
    x = draw(4, weight.shape[1])
    assert not cuda.available(weight, x)

    class OnGPU:
        is_cuda, device, dtype = True, weight.packed.device, torch.float32

    assert not cuda.available(weight, OnGPU())
    if cuda.kernels() is not None:
        with pytest.raises(QuantizationError, match=f"{kind} blocks are GGUF's.*let PyTorch decode"):
            quant_linear(x, weight, backend="triton")
    close(quant_linear(x, weight, backend="reference"), quant_linear_reference(x, weight), 2e-6)


# ---- the layer


@every_kind
def test_all_but_the_bias_is_the_files_bytes(kind):
    weight = weight_of(kind)
    layer = GGUFLinear(weight, nn.Parameter(torch.zeros(ROWS)))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"] and not list(layer.buffers())
    assert layer.codes.dtype == torch.uint8 and not layer.codes.requires_grad
    assert layer.codes.data_ptr() == weight.packed.data_ptr() == layer.quantized().packed.data_ptr()
    assert layer.codes.nbytes == weight.nbytes
    assert is_linear(layer) and is_quantized(layer) and not is_ours(layer) and isinstance(layer, PackedLinear)
    assert in_out_features(layer) == (weight.shape[1], ROWS)
    shown = f"GGUFLinear(in_features={weight.shape[1]}, out_features=13, bias=True, {kind}, {weight.bits_per_weight:.3f} bits)"
    assert repr(layer) == shown


@every_kind
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_storage_survives_every_cast(kind, cast):
    layer = layer_of(kind)
    before, dense = layer.codes.clone(), dense_weight(layer)
    layer.to(cast)
    assert torch.equal(layer.codes, before) and layer.bias.dtype == cast
    assert layer.weight.dtype == compute_dtype(layer) == cast and torch.equal(dense_weight(layer), dense.to(cast))
    x = x_of(layer, cast)
    close(layer(x), F.linear(x.double(), dense.double(), layer.bias.double()).to(cast), TOLERANCE[cast])


@every_kind
def test_state_dict_round_trip(kind):
    source, target = layer_of(kind), layer_of(kind)
    target.codes.data[:, -1] ^= 1
    target.load_state_dict(source.state_dict(), strict=True)
    assert same(source.state_dict(), target.state_dict())
    assert torch.equal(source(x_of(source)), target(x_of(source)))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (lambda: layer_of("Q4_0"), lambda: layer_of("Q4_1"), "the state has format=Q4_0 and this layer Q4_1"),
        (lambda: nf4(), lambda: layer_of("Q4_0"), "the state has format=nf4 and this layer Q4_0"),
        (lambda: layer_of("Q4_0"), lambda: nf4(), "the state has format=Q4_0 and this layer nf4"),
        (lambda: layer_of("Q4_K"), lambda: layer_of("Q4_K", rows=5), r"shape=\[13, 256\] and this layer \[5, 256\]"),
    ],
)
def test_bytes_of_another_format_are_refused(source, target, words):
    layer = target()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(QuantizationError, match=words):
        layer.load_state_dict(source().state_dict())
    assert same(layer.state_dict(), before)


def nf4():
    return QuantLinear.from_linear(nn.Linear(96, ROWS), QuantConfig())


@every_kind
def test_it_is_taken_for_what_it_computes(kind):
    layer = layer_of(kind)
    x, dense = x_of(layer), dense_weight(layer)
    assert carries(layer, x) and frozen_weight(layer).packed is layer.codes
    assert torch.equal(dense, layer.quantized().dequantize()) and torch.equal(dequantize(layer.quantized()), dense)
    torch.testing.assert_close(product(layer, x), F.linear(x, dense))
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.codes.data_ptr() != layer.codes.data_ptr()


def test_a_dense_layer_takes_its_place():
    layer = layer_of("Q6_K", torch.bfloat16).eval()
    layer.register_forward_hook(lambda *call: None)
    layer.note = "kept"
    dense = with_weight(layer, dense_weight(layer))
    assert type(dense) is nn.Linear and dense.weight.dtype == torch.bfloat16 and dense.bias is layer.bias
    assert dense.note == "kept" and not hasattr(dense, "kind") and len(dense._forward_hooks) == 1
    x = x_of(layer, torch.bfloat16)
    close(dense(x), layer(x), 2e-2)
    again = pack(dense, QuantConfig())
    assert type(again) is QuantLinear and again.note == "kept"


def test_a_transposed_layer_becomes_transposed_again():
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = GGUFLinear(weight_of("Q4_1"), nn.Parameter(torch.ones(ROWS)), kind)
    assert layer.weight.shape == (96, ROWS) and torch.equal(layer.weight + 0, dense_weight(layer).t())
    dense = with_weight(layer, dense_weight(layer))
    assert type(dense) is kind and dense.weight.shape == (96, ROWS)
    x = x_of(layer)
    torch.testing.assert_close(dense(x), layer(x))


@every_kind
def test_it_is_not_packed_again(kind):
    layer = layer_of(kind)
    dense = with_weight(layer, dense_weight(layer))
    with pytest.raises(QuantizationError, match=f"fc: is packed as {kind}, a format of GGUF.*leave requantize out"):
        packed_like(layer, dense, "fc")


def test_codes_that_something_wrote_over_are_refused():
    layer = layer_of()
    layer._parameters["weight"] = nn.Parameter(torch.zeros(ROWS, 96), requires_grad=False)
    with pytest.raises(QuantizationError, match=r"holds torch.float32 where its uint8 codes were"):
        layer(torch.zeros(2, 96))
