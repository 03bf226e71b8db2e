"""Products of experts equal their formula, gradients too, for every weight, dtype, routing and need; experts without rows cost nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora import inject
from minilora.linear import ops
from minilora.linear.experts import forwards, rows, whole
from minilora.linear.experts.grouped import lora_experts, lora_experts_reference
from minilora.linear.experts.routes import route
from minilora.linear.experts.whole import Gate, Projection, whole_experts, whole_experts_reference
from minilora.linear.fused import keep_masks
from minilora.lora.config import LoraConfig
from minilora.measure.ledger import Ledger
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import release_scratch
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.stack import QuantizedStack, quantize_stack

E, R, SCALING = 5, 3, 2.5
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
PACKED = {
    "nf4": QuantConfig("nf4"),
    "nf4 double": QuantConfig("nf4", double_quant=True, blocksize=32),
    "fp4": QuantConfig("fp4"),
    "nf2 double": QuantConfig("nf2", double_quant=True),
    "nf3": QuantConfig("nf3", blocksize=32),
    "int8": QuantConfig("int8"),
}
WEIGHTS = ["dense", "transposed", *PACKED]
WHOLE, RAGGED = (24, 64), (21, 33)  # an expert that is so many blocks, and one that is not
ROUTINGS = {
    "mixed": [[0, 3], [4, 1], [3, 0], [1, 2], [4, 3], [0, 1], [2, 4]],
    "none in the middle": [[0, 3], [4, 1], [3, 0], [1, 3], [4, 3]],
    "none first and last": [[1, 3], [2, 1], [3, 2]],
    "one has all": [[2], [2], [2], [2]],
    "some of no expert": [[0, 5], [5, 5], [3, 0], [4, 5]],
    "none of any": [[5, 5], [5, 5]],
    "one token": [[3, 1]],
}

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_weight = pytest.mark.parametrize("kind", WEIGHTS)
every_routing = pytest.mark.parametrize("routing", ROUTINGS)


def draw(*shape, dtype=torch.float32, seed=1, grad=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def weight_of(kind, shape=RAGGED, dtype=torch.float32):
    dense = draw(E, *shape, seed=5, grad=False) * 0.2
    if kind == "dense":
        return dense.to(dtype)
    if kind == "transposed":
        return dense.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return quantize_stack(dense, PACKED[kind])


def exact(weight):
    return (weight.dequantize(torch.float32) if isinstance(weight, QuantizedStack) else weight).double()


def routes_of(routing):
    return route(torch.tensor(ROUTINGS[routing]), E)


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max().clamp(min=1e-30)


def doubles(parts):
    return [None if part is None else part.detach().double().requires_grad_(part.requires_grad) for part in parts]


def gradients(out, parts, cotangent):
    wanted = [part for part in parts if part is not None and part.requires_grad]
    if not out.requires_grad:  # the formula without a single row
        return [torch.zeros_like(part) for part in wanted]
    return torch.autograd.grad(out, wanted, cotangent, allow_unused=True, materialize_grads=True)


def factor_of(x, p, seed):
    """What dropout multiplied x with in a call under this seed: drawn as the function draws, after its seed."""
    torch.manual_seed(seed)
    inner, drop = int(torch.randint(2**62, ())), round(p * 65536)
    mask = torch.cat([mask.clone() for _, mask in keep_masks(x.detach(), drop, inner)])
    return mask * (65536 / (65536 - drop))


def compare(weight, routes, parts, p=0.0, tolerance=None):
    """Output and every gradient beside the formula's in float64 arithmetic of the same numbers."""
    x, A, B = parts
    keep = None
    if p:
        there = routes.spans[-1][2] if routes.spans else 0
        keep = torch.ones_like(x, dtype=torch.float64)
        if there:
            keep[:there] = factor_of(x[:there], p, 7).double()
    torch.manual_seed(7)
    got = lora_experts(x, weight, routes, A, B, SCALING, p)
    twins = doubles(parts)
    want = lora_experts_reference(twins[0], exact(weight), routes, *twins[1:], SCALING, keep)
    tolerance = tolerance or TOLERANCE[x.dtype]
    assert got.dtype == x.dtype
    close(got, want, tolerance)
    cotangent = draw(*want.shape, dtype=x.dtype, seed=6, grad=False)
    mine, theirs = gradients(got, parts, cotangent), gradients(want, twins, cotangent.double())
    for part, one, other in zip([part for part in parts if part.requires_grad], mine, theirs, strict=True):
        assert one.dtype == part.dtype
        close(one, other, tolerance)


def parts_of(routes, shape=RAGGED, dtype=torch.float32, factors=torch.float32):
    """x, A, B."""
    return [draw(len(routes.order), shape[1], dtype=dtype), draw(E, R, shape[1], dtype=factors, seed=3),
            draw(E, shape[0], R, dtype=factors, seed=4)]  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@every_dtype
@every_weight
def test_equals_its_formula(kind, dtype, p):
    routes = routes_of("mixed")
    compare(weight_of(kind, dtype=dtype), routes, parts_of(routes, dtype=dtype), p)


@every_routing
@pytest.mark.parametrize("shape", [WHOLE, RAGGED, (64, 24)], ids=str)
@every_weight
def test_any_routing(kind, shape, routing):
    routes = routes_of(routing)
    compare(weight_of(kind, shape), routes, parts_of(routes, shape), 0.3)


@pytest.mark.parametrize("has_bf16", [False, True], ids=["without bf16", "with bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4"])
def test_both_kinds_of_processor(kind, dtype, factors, has_bf16, monkeypatch):
    monkeypatch.setattr(ops, "cpu_has_bf16", lambda: has_bf16)
    routes = routes_of("some of no expert")
    compare(weight_of(kind, dtype=dtype), routes, parts_of(routes, dtype=dtype, factors=factors), tolerance=3e-2)


@pytest.mark.parametrize("trains", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_any_part_may_be_frozen(kind, p, trains):
    routes = routes_of("none in the middle")
    parts = [part.detach().requires_grad_(bool(on)) for part, on in zip(parts_of(routes), trains, strict=True)]
    compare(weight_of(kind), routes, parts, p)


@every_weight
def test_no_rows(kind):
    routes = route(torch.empty(0, 2, dtype=torch.int64), E)
    x, A, B = parts_of(routes)
    out = lora_experts(x, weight_of(kind), routes, A, B, SCALING, 0.3)
    out.sum().backward()
    assert out.shape == (0, RAGGED[0]) and x.grad.shape == x.shape and not A.grad.any() and not B.grad.any()


@every_dtype
@every_weight
def test_without_factors_it_is_the_frozen_layer(kind, dtype):
    weight, routes = weight_of(kind, dtype=dtype), routes_of("some of no expert")
    x = draw(len(routes.order), RAGGED[1], dtype=dtype)
    got, W = lora_experts(x, weight, routes), exact(weight)
    want = torch.zeros(len(x), RAGGED[0], dtype=torch.float64)
    for at, expert in enumerate(routes.ids.tolist()):
        if expert < E:
            want[at] = W[expert] @ x.detach()[at].double()
    close(got, want, TOLERANCE[dtype])
    cotangent = draw(*got.shape, dtype=dtype, seed=6, grad=False)
    mine, wanted = torch.autograd.grad(got, x, cotangent)[0], torch.zeros_like(x, dtype=torch.float64)
    for at, expert in enumerate(routes.ids.tolist()):
        if expert < E:
            wanted[at] = W[expert].T @ cotangent[at].double()
    close(mine, wanted, TOLERANCE[dtype])


@every_weight
def test_without_gradients_it_says_the_same(kind):
    weight, routes = weight_of(kind), routes_of("mixed")
    x, A, B = parts_of(routes)
    want = lora_experts(x, weight, routes, A, B, SCALING)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(lora_experts(x, weight, routes, A, B, SCALING), want)


@every_weight
def test_under_autocast_it_computes_in_bf16(kind):
    weight, routes = weight_of(kind), routes_of("mixed")
    x, A, B = parts_of(routes)
    with torch.autocast("cpu", torch.bfloat16):
        got = lora_experts(x, weight, routes, A, B, SCALING)
    assert got.dtype == torch.bfloat16
    close(got, lora_experts_reference(x, exact(weight).float(), routes, A, B, SCALING), 3e-2)
    got.sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32 and A.grad.any()


def test_a_weight_that_was_written_to_is_noticed():
    weight, routes = weight_of("dense"), routes_of("mixed")
    out = lora_experts(*parts_of(routes)[:1], weight, routes)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- the whole module


SWIGLU = Gate(lambda y: F.silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :], True)
OTHER = Gate(lambda y: torch.tanh(y[:, ::2]) * (y[:, 1::2] + 1))
UNGATED = Gate(F.gelu)
GATES = {"swiglu": SWIGLU, "another": OTHER, "none": UNGATED}
H, INNER = 33, 10


def projections_of(kind, gate, dtype=torch.float32, low=True, p=0.0):
    wide = INNER if gate is UNGATED else 2 * INNER
    shapes = ((wide, H), (H, INNER))
    made = []
    for place, (rows_, columns) in enumerate(shapes):
        factors = (draw(E, R, columns, seed=10 + place), draw(E, rows_, R, seed=20 + place)) if low else (None, None)
        made.append(Projection(weight_of(kind, (rows_, columns), dtype), *factors, SCALING - place, p))
    return made


def compare_whole(kind, gate, routing, dtype=torch.float32, low=True):
    routes, (up, down) = routes_of(routing), projections_of(kind, gate, dtype, low)
    shape = torch.tensor(ROUTINGS[routing]).shape
    x, weights = draw(shape[0], H, dtype=dtype), draw(*shape, seed=8, dtype=dtype)
    parts = [x, weights, up.A, up.B, down.A, down.B]
    got = whole_experts(x, weights, routes, up, down, gate)
    assert got.dtype == torch.float32
    twins = doubles(parts)
    exact_up = up._replace(weight=exact(up.weight), A=twins[2], B=twins[3])
    exact_down = down._replace(weight=exact(down.weight), A=twins[4], B=twins[5])
    want = whole_experts_reference(twins[0], twins[1], routes, exact_up, exact_down, gate)
    tolerance = 3 * TOLERANCE[dtype]
    close(got, want, tolerance)
    cotangent = draw(*want.shape, seed=6, grad=False)
    mine, theirs = gradients(got, parts, cotangent), gradients(want, twins, cotangent.double())
    for part, one, other in zip([part for part in parts if part is not None], mine, theirs, strict=True):
        assert one.dtype == part.dtype
        close(one, other, tolerance)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@every_dtype
@every_weight
def test_a_whole_module_equals_its_formula(kind, dtype, gate):
    compare_whole(kind, gate, "mixed", dtype)


@every_routing
@pytest.mark.parametrize("low", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_a_whole_module_with_any_routing(kind, low, routing):
    compare_whole(kind, SWIGLU, routing, low=low)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_chunks_fit_together(kind, step, monkeypatch):
    monkeypatch.setattr(whole, "_ROOM", 1)
    monkeypatch.setattr(whole, "_ROWS", step)
    for routing in ROUTINGS:
        compare_whole(kind, SWIGLU, routing)


def test_chunks_are_all_rows_once(monkeypatch):
    monkeypatch.setattr(whole, "_ROOM", 1)
    monkeypatch.setattr(whole, "_ROWS", 4)
    routes = route(torch.tensor([0] * 9 + [1] * 2 + [3] * 2 + [4] * 4).unsqueeze(1), E)
    up, down = projections_of("dense", SWIGLU)
    plan = whole._Plan(routes, up, down, rows.Factors(1.0), rows.Factors(1.0), SWIGLU)
    found, seen = [], set()
    for chunk, spans in plan.chunks():
        assert chunk.stop - chunk.start <= 4 and spans[0].first == 0 and spans[-1].last == chunk.stop - chunk.start
        for span in spans:
            assert span.again == (span.expert in seen)
            seen.add(span.expert)
            found += [(chunk.start + at, span.expert) for at in range(span.first, span.last)]
    assert found == list(enumerate(routes.ids.tolist()))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dropout_of_a_whole_module(kind):
    """The backward pass draws the masks of the forward pass, and each projection its own: a derivative that differences agree with."""
    routes, shape = routes_of("mixed"), (7, 2)
    up, down = projections_of(kind, SWIGLU, p=0.4)
    x, weights = draw(shape[0], H), draw(*shape, seed=8)

    def run(shift):
        torch.manual_seed(3)
        moved = [part + shift * draw(*part.shape, seed=30, grad=False) for part in (up.A, up.B, down.A, down.B)]
        own = up._replace(A=moved[0], B=moved[1]), down._replace(A=moved[2], B=moved[3])
        return (
            whole_experts(x + shift * draw(*x.shape, seed=31, grad=False), weights, routes, *own, SWIGLU).double().sum()
        )

    torch.manual_seed(3)
    out = whole_experts(x, weights, routes, up, down, SWIGLU)
    parts = [up.A, up.B, down.A, down.B, x]
    found = torch.autograd.grad(out.sum(), parts)
    seeds = [30] * 4 + [31]
    slope = sum(
        (one * draw(*one.shape, seed=seed, grad=False)).double().sum() for one, seed in zip(found, seeds, strict=True)
    )
    with torch.no_grad():
        measured = (run(1e-2) - run(-1e-2)) / 2e-2
        assert (
            whole_experts(x, weights, routes, up, down, SWIGLU) - out
        ).abs().max() > 1e-2  # another seed, another mask
    assert abs(slope - measured) < 2e-2 * abs(measured)


# ---- what is not done


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_only_experts_with_rows_are_decoded(kind, monkeypatch):
    asked, one = [], QuantizedStack.one
    monkeypatch.setattr(QuantizedStack, "one", lambda self, at: asked.append(at) or one(self, at))
    routes = routes_of("none first and last")
    x, A, B = parts_of(routes)
    out = lora_experts(x, weight_of(kind), routes, A, B, SCALING)
    assert asked == [1, 2, 3]
    out.sum().backward()
    assert asked == [1, 2, 3, 1, 2, 3]
    assert not A.grad[[0, 4]].any() and A.grad[[1, 2, 3]].flatten(1).any(1).all()


def test_an_expert_without_rows_is_not_read():
    weight, routes = weight_of("dense"), routes_of("none first and last")
    weight[[0, 4]] = torch.nan
    x, A, B = parts_of(routes)
    with torch.no_grad():
        A[[0, 4]], B[[0, 4]] = torch.nan, torch.nan
    out = lora_experts(x, weight, routes, A, B, SCALING)
    assert all(torch.isfinite(part).all() for part in (out, *gradients(out, [x, A, B], torch.ones_like(out))))


@pytest.mark.parametrize("run", ["projection", "module"])
@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_nothing_dense_of_all_experts_is_formed(kind, run):
    count, wide = 40, 64
    dense = draw(count, wide, wide, seed=5, grad=False)
    weight = dense if kind == "dense" else quantize_stack(dense, PACKED[kind])
    A, B = draw(count, 2, wide, seed=3), draw(count, wide, 2, seed=4)
    index = torch.arange(count).view(-1, 1)
    routes, x = route(index, count), draw(count, wide)
    release_scratch()
    with Ledger() as ledger:
        if run == "projection":
            lora_experts(x, weight, routes, A, B, SCALING).sum().backward()
        else:
            part = Projection(weight, A, B, SCALING)
            whole_experts(x, draw(count, 1), routes, part, part, UNGATED).sum().backward()
    whole_bytes = dense.numel() * 4
    large = [held.nbytes for sign, held, _ in ledger._events if sign > 0 and held.nbytes >= whole_bytes / 4]
    assert large == ([whole_bytes] if kind == "dense" else [])  # the weight itself


def test_a_packed_matrix_is_the_stacks_own():
    stack = weight_of("nf4 double", WHOLE)
    assert isinstance(rows.one_expert(stack, 2), QuantizedTensor)
    assert torch.equal(rows.one_expert(stack, 2).dequantize(), stack.dequantize()[2])


# ---- in a model


class Mixture(nn.Module):
    """The experts of Qwen3-MoE, alone."""

    def __init__(self, dtype=torch.float32):
        moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = moe.Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INNER, num_experts=E)
        config._experts_implementation = "grouped_mm"
        super().__init__()
        self.experts = moe.Qwen3MoeExperts(config)
        for place, weight in enumerate(self.experts.parameters()):
            weight.data = draw(*weight.shape, dtype=dtype, seed=40 + place, grad=False) * 0.3

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def adapted(kind, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = Mixture(dtype)
    if kind != "dense":
        minilora.quantize_model(model, PACKED[kind])
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    inject(
        model,
        LoraConfig(r=R, lora_alpha=7, target_modules=[], target_parameters=targets, init_lora_weights=False, **fields),
    )
    return model


def run(model, dtype=torch.float32, index=None):
    """Output, and the gradients of tokens, weights and factors."""
    index = torch.tensor(ROUTINGS["mixed"]) if index is None else index
    x, weights = draw(len(index), H, dtype=dtype), draw(*index.shape, seed=8, dtype=dtype)
    out = model(x, index, weights)
    out.backward(draw(*out.shape, seed=6, dtype=dtype, grad=False))
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def called(monkeypatch):
    """How often the whole module was one function."""
    found = []
    monkeypatch.setattr(forwards, "whole_experts", lambda *args: found.append(1) or whole_experts(*args))
    return found


@every_dtype
@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_projection_by_projection_says_the_same(kind, dtype, called):
    model = adapted(kind, dtype)
    found = run(model, dtype)
    model.zero_grad()
    assert called == [1] and len(found) == 7
    for layer in model.experts.children():
        layer.register_forward_hook(lambda *args: None)
    for one, other in zip(found, run(model, dtype), strict=True):
        assert one.dtype == other.dtype
        close(one, other, 2 * TOLERANCE[dtype])
    assert called == [1]  # a hook sees every projection


def test_a_hook_on_a_projection_is_called(called):
    model, seen = adapted("dense"), []
    model.experts.down_proj.register_forward_hook(lambda layer, args, out: seen.append(tuple(out.shape)))
    run(model)
    assert seen == [(14, H)] and not called


@pytest.mark.parametrize(
    "change", ["a gate of the object's own", "a hook on the activation", "another parameter", "a base that trains"]
)
def test_what_is_not_the_plain_module_goes_its_own_way(change, called):
    model = adapted("dense")
    if change == "a gate of the object's own":
        own = model.experts._apply_gate
        model.experts._apply_gate = lambda y: 2 * own(y)
        plain = adapted("dense")
        assert (run(model)[0] - 2 * run(plain)[0]).abs().max() < 1e-4
        return
    if change == "a hook on the activation":
        model.experts.act_fn.register_forward_hook(lambda *args: None)
    elif change == "another parameter":
        model.experts.extra = nn.Parameter(torch.zeros(1))
    else:
        model.experts.down_proj.base_layer.weight.requires_grad_()
    run(model)
    assert not called


def test_an_index_beyond_the_last_expert_adds_nothing(called):
    model = adapted("dense")
    index = torch.tensor(ROUTINGS["some of no expert"])
    found = run(model, index=index)
    assert called == [1] and not found[0][1].any() and not found[1][1].any() and not found[2][index == E].any()
    assert found[0][0].any()


def test_the_last_expert_without_rows_has_no_gradient(called):
    found = run(adapted("dense"), index=torch.tensor([[0, 1], [1, 0]]))
    assert called and all(not grad[2:].any() and grad[:2].flatten(1).any(1).all() for grad in found[3:])


def test_dropout_is_seeded(called):
    model, index = adapted("dense", lora_dropout=0.5).train(), torch.tensor(ROUTINGS["mixed"])
    x, weights = draw(7, H), draw(7, 2, seed=8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x, index, weights))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2]) and len(called) == 3
