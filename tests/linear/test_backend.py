"""``backend="triton"`` behind the call sites: the kernels, here in Triton's interpreter, in quant_linear and the adapted layer."""

import pytest
import torch

from minilora import QuantConfig
from minilora.errors import ConfigError
from minilora.linear import ops
from minilora.linear.fused import lora_linear
from minilora.linear.ops import quant_linear
from minilora.quant.blockwise import quantize

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

SHAPES = [(64, 128), (40, 72)]  # one divides into tiles, one is decoded in slices
FORMS = [QuantConfig(), QuantConfig(double_quant=True), QuantConfig("nf2"), QuantConfig("bof4s")]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", FORMS, ids=lambda config: f"{config.format}-{config.double_quant}")
def test_quant_linear_on_the_kernels(shape, config):
    weight = quantize(draw(*shape, seed=1) * 0.1, config)
    results = []
    for backend in ops.BACKENDS:
        x, bias = draw(2, 9, shape[1]).requires_grad_(), draw(shape[0], seed=2).requires_grad_()
        out = quant_linear(x, weight, bias, backend)
        out.backward(draw(*out.shape, seed=3))
        results.append((out.detach(), x.grad, bias.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_adapted_layer_on_the_kernels(shape, p):
    weight, r, scaling = quantize(draw(*shape, seed=1) * 0.1, QuantConfig(double_quant=True)), 4, 3.0
    results = []
    for backend in ops.BACKENDS:
        x = draw(3, 7, shape[1]).requires_grad_()
        A, B = draw(r, shape[1], seed=4).requires_grad_(), draw(shape[0], r, seed=5).requires_grad_()
        bias = draw(shape[0], seed=6).requires_grad_()
        torch.manual_seed(11)
        out = lora_linear(x, weight, bias, A, B, scaling, p, backend)
        out.backward(draw(*out.shape, seed=3))
        results.append((out.detach(), x.grad, bias.grad, A.grad, B.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        close(ours, theirs)


def test_the_operator_with_a_backend_is_well_made():
    weight = quantize(draw(24, 40, seed=1), QuantConfig(double_quant=True))
    for backend in (None, *ops.BACKENDS):
        arguments = (
            draw(5, 40).requires_grad_(),
            *ops._flatten(weight),
            True,
            draw(24, seed=2).requires_grad_(),
            backend,
        )
        torch.library.opcheck(torch.ops.minilora.quant_matmul.default, arguments)


def test_the_kernels_stand_in_a_compiled_graph():
    """The operator is opaque to the compiler: what runs inside is chosen when it runs."""
    weight, x = quantize(draw(64, 128, seed=1), QuantConfig()), draw(5, 128)
    compiled = torch.compile(lambda x: quant_linear(x, weight, None, "triton") * 2, fullgraph=True, backend="aot_eager")
    close(compiled(x), 2 * quant_linear(x, weight))


def test_the_choice_without_an_argument(monkeypatch):
    """On a GPU with kernels they are taken, forward and backward, for packed weights alone; on a CPU PyTorch is."""
    weight, called = quantize(draw(64, 128, seed=1), QuantConfig()), []
    real = ops.cuda.matmul

    def watched(*args, **kwargs):
        called.append(args[2])
        return real(*args, **kwargs)

    monkeypatch.setattr(ops.cuda, "matmul", watched)
    x = draw(5, 128).requires_grad_()
    quant_linear(x, weight).sum().backward()
    assert called == []
    monkeypatch.setattr(ops.cuda, "available", lambda weight, x: True)
    quant_linear(x, weight).sum().backward()
    lora_linear(x, weight, None, draw(4, 128), draw(64, 4), 2.0).sum().backward()
    assert called == [True, False, True, False]
    lora_linear(x, draw(64, 128), None, draw(4, 128), draw(64, 4), 2.0).sum().backward()
    quant_linear(x, weight, backend="reference").sum().backward()
    assert len(called) == 4


def test_a_backend_that_does_not_exist_is_named():
    weight = quantize(draw(64, 128, seed=1), QuantConfig())
    with pytest.raises(ConfigError, match="backend='cuda': wanted None or one of 'reference', 'triton'"):
        quant_linear(draw(5, 128), weight, backend="cuda")
