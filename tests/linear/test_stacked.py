"""Several low-rank parts in one product: the formula, its gradients, and what one run beside others computes alone."""

import pytest
import torch

from minilora import QuantConfig, quantize
from minilora.linear.fused import keep_masks, lora_linear, parts_dropped
from minilora.linear.stacked import Part, stacked_linear, stacked_linear_reference

OUT, IN, ROWS = 40, 72, 23
PLACES = [slice(0, 6), torch.tensor([7, 9, 10, 15]), slice(16, 23)]  # rows 6, 8 and 11 to 14 are nobody's
RANKS = [3, 1, 5]


def drawn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight_of(kind, dtype):
    dense = drawn(OUT, IN, seed=1).float()
    if kind == "packed":
        return quantize(dense, QuantConfig(double_quant=True))
    return dense.to(dtype)


def parts_of(dtype, p=0.0, train=True):
    made = []
    for number, (place, r) in enumerate(zip(PLACES, RANKS, strict=True)):
        A, B = drawn(r, IN, seed=10 + number, dtype=dtype), drawn(OUT, r, seed=20 + number, dtype=dtype)
        made.append(Part(place, A.requires_grad_(train), B.requires_grad_(train), 1.5 + number, p, 30 + number))
    return made


def keeps_of(parts, x):
    """The masks that the parts draw, divided by the share that they keep."""
    found = []
    for part in parts:
        own, drop = x[part.place], parts_dropped(part.p)
        mask = torch.cat([mask.clone() for _, mask in keep_masks(own, drop, part.seed)])
        found.append(mask.to(x.dtype) * 65536 / (65536 - drop))
    return found


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [("dense", torch.float64, 1e-12), ("dense", torch.float32, 2e-5), ("packed", torch.float32, 2e-5)],
    ids=str,
)
def test_the_formula_and_its_gradients(kind, dtype, most, p):
    x = drawn(ROWS, IN, seed=2, dtype=dtype).requires_grad_(True)
    weight, bias, parts = weight_of(kind, dtype), drawn(OUT, seed=3, dtype=dtype), parts_of(dtype, p)
    keeps = keeps_of(parts, x) if p else [None] * len(parts)
    out, want = stacked_linear(x, weight, bias, parts), stacked_linear_reference(x, weight, bias, parts, keeps)
    trained = [x, *(factor for part in parts for factor in (part.A, part.B))]
    grad = drawn(ROWS, OUT, seed=4, dtype=dtype)
    got, wanted = (torch.autograd.grad(y, trained, grad) for y in (out, want))
    for a, b in zip([out, *got], [want, *wanted], strict=True):
        assert (a - b).abs().max() <= most * b.abs().max()


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_run_beside_others_is_the_run_alone(kind):
    x, weight, parts = (
        drawn(ROWS, IN, seed=2, dtype=torch.float32),
        weight_of(kind, torch.float32),
        parts_of(torch.float32, 0.4),
    )
    out = stacked_linear(x, weight, None, parts)
    for part in parts:
        seed = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        drawn_seed = int(torch.randint(2**62, (), generator=seed))
        torch.manual_seed(0)
        alone = lora_linear(x[part.place], weight, None, part.A, part.B, part.scaling, part.p)
        (beside,) = [Part(part.place, part.A, part.B, part.scaling, part.p, drawn_seed)]
        assert torch.allclose(stacked_linear(x, weight, None, [beside])[part.place], alone, atol=1e-5)
    nobody = [6, 8, 11, 14]
    plain = lora_linear(x, weight)
    assert torch.allclose(out[nobody], plain[nobody], atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient():
    parts = parts_of(torch.float32, train=False)
    parts[1].B.requires_grad_(True)
    x = drawn(2, 11, IN, seed=2, dtype=torch.float32)[:, :, :]
    out = stacked_linear(torch.cat([x.flatten(0, 1), x[0, :1]]), weight_of("dense", torch.float32), None, parts)
    out.sum().backward()
    assert parts[1].B.grad is not None and all(part.A.grad is None for part in parts) and parts[0].B.grad is None


def test_leading_dimensions_are_kept_and_bf16_flows():
    x = drawn(2, 8, IN, seed=2, dtype=torch.bfloat16)
    parts = [
        Part(slice(0, 8), drawn(3, IN, seed=5, dtype=torch.float32), drawn(OUT, 3, seed=6, dtype=torch.float32), 0.5)
    ]
    out = stacked_linear(x, weight_of("dense", torch.bfloat16), None, parts)
    assert out.shape == (2, 8, OUT) and out.dtype is torch.bfloat16
    want = stacked_linear_reference(x.flatten(0, 1).double(), weight_of("dense", torch.bfloat16).double(), None,
                                    [Part(p.place, p.A.double(), p.B.double(), p.scaling) for p in parts], [None])  # fmt: skip
    assert (out.flatten(0, 1).double() - want).norm() <= 1e-2 * want.norm()
