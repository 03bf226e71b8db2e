"""``cuda.grouped``, the door to the kernels for a stack of experts: here in Triton's interpreter, against the dense weights."""

import pytest
import torch

from minilora import QuantConfig
from minilora.errors import MissingPackageError, QuantizationError
from minilora.linear import cuda
from minilora.linear.experts.grouped import lora_experts
from minilora.linear.experts.routes import Routes
from minilora.quant.blockwise import quantize
from minilora.quant.stack import quantize_stack

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

SHAPES = [(3, 64, 128), (3, 40, 72), (1, 130, 192)]  # the second is decoded first, and rows are no whole blocks
FORMS = [QuantConfig(), QuantConfig(double_quant=True), QuantConfig("nf2"), QuantConfig("bof4s")]
R, SCALING = 4, 3.0  # lora_alpha = 12


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-6, atol=2e-6 * float(theirs.abs().max()))


def rows_of(experts):
    """The expert of each of nine rows, and where each expert's rows end; the second of three has none."""
    expert = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 2]).clamp(max=experts - 1)
    return expert, torch.bincount(expert, minlength=experts).cumsum(0).int()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", FORMS, ids=lambda config: f"{config.format}-{config.double_quant}")
def test_forward_and_gradient_are_autograd_s(shape, config):
    experts, n, k = shape
    weight, (expert, offs) = quantize(draw(*shape, seed=1) * 0.1, config), rows_of(experts)
    A, B = draw(experts, R, k, seed=2), draw(experts, n, R, seed=3)
    x, grad = draw(9, k), draw(9, n, seed=4)
    leaf = x.double().requires_grad_()
    h = SCALING * torch.einsum("sk,srk->sr", leaf, A.double()[expert])
    own = weight.dequantize(torch.float64)[expert]
    want = torch.einsum("sk,snk->sn", leaf, own) + torch.einsum("sr,snr->sn", h, B.double()[expert])
    (want_x,) = torch.autograd.grad(want, leaf, grad.double())
    close(cuda.grouped(x, weight, offs, True, h.detach().float(), B), want.detach())
    gh = SCALING * torch.einsum("sn,snr->sr", grad, B[expert])
    close(cuda.grouped(grad, weight, offs, False, gh, A), want_x)
    close(cuda.grouped(x, weight, offs, True), torch.einsum("sk,snk->sn", x.double(), own))
    close(cuda.grouped(grad, weight, offs, False), torch.einsum("sn,snk->sk", grad.double(), own))


def test_one_expert_is_the_product_without_experts():
    weight = quantize(draw(130, 192, seed=1) * 0.1, QuantConfig(double_quant=True))
    stack = quantize(draw(130, 192, seed=1).view(1, 130, 192) * 0.1, QuantConfig(double_quant=True))
    x, h, B = draw(9, 192), draw(9, R, seed=2), draw(130, R, seed=3)
    offs = torch.tensor([9], dtype=torch.int32)
    close(cuda.grouped(x, stack, offs, True, h, B[None]), cuda.matmul(x, weight, True, h, B))


def test_rows_of_nobody_are_zero_and_the_result_has_the_dtype_asked_for():
    weight, x = quantize(draw(3, 64, 128, seed=1), QuantConfig()), draw(9, 128)
    x[6:] = float("nan")
    offs = torch.tensor([2, 2, 6], dtype=torch.int32)
    out = cuda.grouped(x, weight, offs, True, out_dtype=torch.float16)
    assert out.dtype == torch.float16 and not out.isnan().any() and not out[6:].any() and out[:6].any(1).all()


def test_memory_is_shared_not_copied():
    weight = quantize(draw(3, 64, 128, seed=1), QuantConfig(double_quant=True))
    inside = cuda.kernel_weight(weight)
    assert inside.shape == (192, 128) and inside.packed.data_ptr() == weight.packed.data_ptr()


def test_whether_it_can(monkeypatch):
    """On a CPU never; where a GPU would do, if every expert has whole blocks and the codes 4 or 2 bits."""
    stack, ragged = (quantize(draw(3, 8, k, seed=1), QuantConfig()) for k in (64, 12))
    x = draw(9, 64)
    assert not cuda.grouped_available(stack, x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(cuda.kernels(), "supported", lambda device, dtype: dtype == torch.float32)
    matrix, three = quantize(draw(64, 64), QuantConfig()), quantize(draw(3, 8, 64), QuantConfig("nf3"))
    assert cuda.grouped_available(stack, x) and not cuda.grouped_available(stack, x.double())
    assert not any(cuda.grouped_available(weight, x) for weight in (ragged, matrix, three))
    assert cuda.available(matrix, x) and not cuda.available(stack, x)


def test_what_the_kernels_cannot_take_is_refused_with_the_way_out(monkeypatch):
    offs = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(
        QuantizationError,
        match=r"is \(3, 8, 12\) with blocks of 64; wanted \[experts, out, in\] with whole blocks .*PyTorch decode",
    ):
        cuda.grouped(draw(9, 12), quantize(draw(3, 8, 12), QuantConfig()), offs, True)
    with pytest.raises(QuantizationError, match=r"is \(64, 64\) with blocks of 64; wanted \[experts, out, in\]"):
        cuda.grouped(draw(9, 64), quantize(draw(64, 64), QuantConfig()), offs, True)
    with pytest.raises(QuantizationError, match="'nf3' has 3 bits; the kernels take 4 or 2"):
        cuda.grouped(draw(9, 64), quantize(draw(3, 8, 64), QuantConfig("nf3")), offs, True)
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    with pytest.raises(MissingPackageError, match="Triton, which is not installed"):
        cuda.grouped(draw(9, 64), quantize(draw(3, 8, 64), QuantConfig()), offs, True)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("config", FORMS[:3], ids=lambda config: f"{config.format}-{config.double_quant}")
def test_experts_take_the_kernels_where_they_can_be_had(monkeypatch, config, p):
    """The layer's own function, forward and backward: with the kernels what it is without."""
    stack, (expert, ends) = quantize_stack(draw(3, 64, 128, seed=1) * 0.1, config), rows_of(3)
    routes = Routes(torch.arange(9), expert, ends)
    x, A, B = (
        draw(9, 128).requires_grad_(),
        draw(3, R, 128, seed=2).requires_grad_(),
        draw(3, 64, R, seed=3).requires_grad_(),
    )
    door, found, calls = cuda.grouped, [], []
    for kernels in (False, True):
        monkeypatch.setattr(cuda, "grouped_available", lambda weight, x, kernels=kernels: kernels)
        monkeypatch.setattr(cuda, "grouped", lambda *args: (calls.append(args[3]), door(*args))[1])
        torch.manual_seed(5)
        out = lora_experts(x, stack, routes, A, B, SCALING, p)
        found.append((out, *torch.autograd.grad(out, (x, A, B), draw(9, 64, seed=4))))
        monkeypatch.undo()
    assert calls == [True, False]  # one launch forward, one backward
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours.detach(), theirs.detach())
