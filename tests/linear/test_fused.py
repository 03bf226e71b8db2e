"""The adapted layer in one function equals its three-line formula, gradients too, for every weight, dtype, shape and need."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora import inject
from minilora.linear import fused, layers, ops
from minilora.linear.fused import keep_masks, lora_linear, lora_linear_reference
from minilora.linear.layers import Frozen, QuantLinear
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.many.adapted import unload
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from tests.compare import saved_bytes

R, SCALING = 3, 2.5
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
WEIGHTS = ["dense", "transposed", "nf4", "nf4 double", "nf2"]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_weight = pytest.mark.parametrize("kind", WEIGHTS)
dropout = pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])


def draw(*shape, dtype=torch.float32, seed=1, grad=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def weight_of(kind, shape=(20, 33), dtype=torch.float32):
    dense = draw(*shape, seed=5, grad=False) * 0.2
    if kind == "dense":
        return dense.to(dtype)
    if kind == "transposed":
        return dense.to(dtype).t().contiguous().t()
    config = QuantConfig("nf2" if kind == "nf2" else "nf4", double_quant="double" in kind, blocksize=32)
    return quantize(dense, config)


def parts(shape=(20, 33), dtype=torch.float32, lead=(2, 5), factors=torch.float32):
    """x, bias, A, B."""
    bias = draw(shape[0], dtype=dtype, seed=2)
    return [draw(*lead, shape[1], dtype=dtype), bias, draw(R, shape[1], dtype=factors, seed=3),
            draw(shape[0], R, dtype=factors, seed=4)]  # fmt: skip


def close(got, want, tolerance):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max().clamp(min=1e-30)


def factor_of(x, p, seed):
    """What dropout multiplied x with in a call under this seed: drawn as the function draws, after its seed."""
    torch.manual_seed(seed)
    inner = int(torch.randint(2**62, ()))
    flat, drop = x.detach().reshape(-1, x.shape[-1]), round(p * 65536)
    mask = torch.cat([mask.clone() for _, mask in keep_masks(flat, drop, inner)]).view(x.shape)
    return mask * (65536 / (65536 - drop))


def compare(weight, inputs, p=0.0, tolerance=None, seed=7):
    """Output and every gradient beside the formula's in float64 arithmetic of the same numbers."""
    x, bias, A, B = inputs
    keep = factor_of(x, p, seed).double() if p else None
    torch.manual_seed(seed)
    got = lora_linear(x, weight, bias, A, B, SCALING, p)
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
    twins = [None if part is None else part.detach().double().requires_grad_(part.requires_grad) for part in inputs]
    want = lora_linear_reference(twins[0], dense.double(), *twins[1:], SCALING, keep)
    tolerance = tolerance or TOLERANCE[x.dtype]
    close(got, want.to(x.dtype), tolerance)
    cotangent = draw(*want.shape, dtype=x.dtype, seed=6, grad=False)
    ours = [part for part in inputs if part is not None and part.requires_grad]
    theirs = [part for part in twins if part is not None and part.requires_grad]
    gradients = zip(
        torch.autograd.grad(got, ours, cotangent), torch.autograd.grad(want, theirs, cotangent.double()), strict=True
    )
    for part, (mine, exact) in zip(ours, gradients, strict=True):
        close(mine, exact.to(part.dtype), tolerance)
    return got


@dropout
@every_dtype
@every_weight
def test_equals_its_formula(kind, dtype, p):
    compare(weight_of(kind, dtype=dtype), parts(dtype=dtype), p)


@pytest.mark.parametrize("has_bf16", [False, True], ids=["without bf16", "with bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_weight
def test_both_kinds_of_processor(kind, dtype, has_bf16, monkeypatch):
    monkeypatch.setattr(ops, "cpu_has_bf16", lambda: has_bf16)
    compare(weight_of(kind, dtype=dtype), parts(dtype=dtype), 0.3)


@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4", "nf4 double"])
@every_dtype
def test_slices_of_the_weight_and_of_the_mask_fit_together(kind, dtype, monkeypatch):
    monkeypatch.setattr(ops, "_ROWS", 1)
    monkeypatch.setattr(fused, "_ELEMENTS", 1)
    monkeypatch.setattr(ops, "cpu_has_bf16", lambda: False)
    shape = (130, 33)
    compare(weight_of(kind, shape, dtype), parts(shape, dtype, lead=(3, 7)), 0.3, tolerance=2 * TOLERANCE[dtype])


@dropout
@every_weight
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3, 4), (0,)], ids=str)
@pytest.mark.parametrize("shape", [(7, 200), (200, 7), (1, 64), (65, 1)], ids=str)
def test_any_shape(shape, lead, kind, p):
    if lead != (0,):
        compare(weight_of(kind, shape), parts(shape, lead=lead), p)
        return
    x, bias, A, B = parts(shape, lead=lead)
    out = lora_linear(x, weight_of(kind, shape), bias, A, B, SCALING, p)
    out.sum().backward()
    assert out.shape == (0, shape[0]) and x.grad.shape == (0, shape[1]) and not A.grad.any()


@dropout
@every_weight
@pytest.mark.parametrize("trains", [(1, 0, 1, 1), (0, 0, 1, 1), (0, 0, 0, 1), (1, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)],
                         ids=lambda t: "+".join(n for n, on in zip(("x", "bias", "A", "B"), t, strict=True) if on))  # fmt: skip
def test_any_part_may_be_frozen(trains, kind, p):
    inputs = [part.detach().requires_grad_(bool(on)) for part, on in zip(parts(), trains, strict=True)]
    compare(weight_of(kind), inputs, p)


@every_weight
def test_without_bias(kind):
    x, _, A, B = parts()
    compare(weight_of(kind), [x, None, A, B])


@every_dtype
@every_weight
def test_without_factors_it_is_the_frozen_layer(kind, dtype, monkeypatch):
    monkeypatch.setattr(ops, "cpu_has_bf16", lambda: False)
    x, bias, A, B = parts(dtype=dtype)
    weight = weight_of(kind, dtype=dtype)
    got, (gx, gb) = lora_linear(x, weight, bias), (None, None)
    gx, gb = torch.autograd.grad(got.float().square().sum(), (x, bias))
    zero = lora_linear(x, weight, bias, A, torch.zeros_like(B), SCALING)
    assert torch.equal(got, zero)
    close(gx, torch.autograd.grad(zero.float().square().sum(), x)[0], TOLERANCE[dtype])
    assert gb.shape == bias.shape


@dropout
def test_strides_of_inputs_and_gradients_do_not_matter(p):
    x, bias, A, B = parts(lead=(6,))
    turned = x.detach().t().contiguous().requires_grad_()
    torch.manual_seed(7)
    plain = lora_linear(x, weight_of("nf4"), bias, A, B, SCALING, p)
    torch.manual_seed(7)
    other = lora_linear(turned.t(), weight_of("nf4"), bias, A, B, SCALING, p)
    close(plain, other, 1e-6)
    plain.sum().backward()  # the gradient of a sum has stride zero
    (got,) = torch.autograd.grad(other.sum(), turned)
    close(got.t().contiguous(), x.grad, 1e-6)


@dropout
@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_gradcheck(kind, p):
    weight = weight_of(kind, (7, 33), torch.float64)
    inputs = [part.detach().double().requires_grad_() for part in parts((7, 33), lead=(4,))]

    def seeded(*parts):
        torch.manual_seed(3)
        return lora_linear(parts[0], weight, *parts[1:], SCALING, p)

    assert torch.autograd.gradcheck(seeded, inputs)


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    x, bias, A, B = parts()
    (first,) = torch.autograd.grad(lora_linear(x, weight_of("dense"), bias, A, B).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --- dropout ---


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_the_share_it_should(p):
    x = torch.ones(400, 1000)
    mask = torch.cat([mask.clone() for _, mask in keep_masks(x, round(p * 65536), 11)])
    assert mask.shape == x.shape
    expected, spread = 1 - p, (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(mask.double().mean()) - expected) < 5 * spread + 1 / 65536
    assert float(mask.double().mean(0).std()) < 2 * (p * (1 - p) / 400) ** 0.5, "columns are independent"
    assert not torch.equal(mask[:200], mask[200:])


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    x, A, B = torch.ones(20000, 33), torch.ones(R, 33), torch.ones(20, R)
    torch.manual_seed(0)
    mean = float(lora_linear(x, torch.zeros(20, 33), None, A, B, 1.0, 0.3).mean())
    assert abs(mean - 33 * R) < 0.4


def test_one_seed_one_result_and_the_next_call_another():
    x, bias, A, B = parts()

    def call():
        return lora_linear(x, weight_of("dense"), bias, A, B, SCALING, 0.3)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_mask(reentrant):
    torch.manual_seed(0)
    layer = scattered(nn.Linear(33, 20), lora_dropout=0.3)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x = draw(5, 33)
        torch.manual_seed(9)
        call(x).square().sum().backward()
        results.append([x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
        layer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- what is kept for the backward pass ---


@dropout
@every_dtype
@every_weight
def test_only_x_and_the_thin_product_are_kept(kind, dtype, p):
    weight, (x, bias, A, B) = weight_of(kind, (96, 320), dtype), parts((96, 320), dtype, lead=(50,))
    own = [weight] if isinstance(weight, torch.Tensor) else [weight.packed, weight.absmax]
    own += [] if "double" not in kind else [weight.nested_absmax, weight.nested_offset]
    kept = saved_bytes(lambda: lora_linear(x, weight, bias, A, B, SCALING, p), [x, A, B, bias, *own])
    wide = ops.product_dtype(dtype, x.device).itemsize
    assert kept == 50 * R * wide


def test_a_frozen_a_does_not_keep_x():
    x, bias, A, B = parts(lead=(50,))
    assert (
        saved_bytes(lambda: lora_linear(x, weight_of("nf4"), bias, A.detach(), B), [A, B, *ops_parts()]) < 4 * 50 * 33
    )


def ops_parts():
    weight = weight_of("nf4")
    return weight.packed, weight.absmax


# --- in a layer ---


def scattered(base, dtype=torch.float32, **fields):
    base.to(dtype).requires_grad_(False)
    adapter = LoRALinear(base, LoraConfig(r=R, lora_alpha=7, **fields)).train()
    torch.manual_seed(1)
    for parameter in (adapter.lora_A, adapter.lora_B, adapter.lora_bias):
        if parameter is not None:
            nn.init.normal_(parameter, std=0.3)
    return adapter


def packed():
    return QuantLinear.from_linear(nn.Linear(33, 20), QuantConfig(double_quant=True))


BASES = {"linear": lambda: nn.Linear(33, 20), "quantized": packed}
every_base = pytest.mark.parametrize("build", BASES.values(), ids=BASES)


@pytest.fixture
def calls(monkeypatch):
    """How many times the function was used by layers."""
    seen = []

    def counted(*arguments):
        seen.append(arguments)
        return lora_linear(*arguments)

    monkeypatch.setattr("minilora.lora.layer.lora_linear", counted)
    monkeypatch.setattr("minilora.linear.layers.lora_linear", counted)
    return seen


def plain_way(adapter, x):
    return adapter.base_layer(x) + adapter.update(adapter.lora_dropout(x))


@every_dtype
@every_base
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
def test_a_layer_uses_it_and_equals_the_lesson(build, dtype, lora_bias, calls):
    adapter = scattered(build(), dtype, lora_bias=lora_bias)
    trained = [p for p in (adapter.lora_A, adapter.lora_B, adapter.lora_bias) if p is not None]
    x, twin = draw(2, 5, 33, dtype=dtype), draw(2, 5, 33, dtype=dtype)
    got, want = adapter(x), plain_way(adapter, twin)
    assert len(calls) == 1
    close(got, want, TOLERANCE[dtype])
    ours = torch.autograd.grad(got.float().square().sum(), [x, *trained])
    theirs = torch.autograd.grad(want.float().square().sum(), [twin, *trained])
    for mine, exact in zip(ours, theirs, strict=True):
        close(mine, exact, 2 * TOLERANCE[dtype])


@every_base
def test_no_grad_and_eval_mode(build, calls):
    adapter = scattered(build(), lora_dropout=0.3).eval()
    with torch.no_grad():
        got = adapter(draw(5, 33))
    assert not got.requires_grad and len(calls) == 1
    close(got, plain_way(adapter, draw(5, 33)).detach(), 4e-6)


def test_hooks_on_the_base_layer_are_called(calls):
    adapter, seen = scattered(nn.Linear(33, 20)), []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(adapter.base_layer, register)(lambda *_: seen.append(1))
        adapter(draw(5, 33))
        handle.remove()
    handle = adapter.base_layer.register_full_backward_hook(lambda *_: seen.append(1))
    adapter(draw(5, 33)).sum().backward()
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(1) if m is adapter.base_layer else None
    )
    adapter(draw(5, 33))
    handle.remove()
    adapter.base_layer.forward = lambda x: (
        seen.append(1) or nn.Linear.forward(adapter.base_layer, x)
    )  # as accelerate does
    adapter(draw(5, 33))
    assert len(seen) == 5 and not calls


def test_a_hook_on_dropout_is_called(calls):
    adapter, seen = scattered(nn.Linear(33, 20), lora_dropout=0.3), []
    adapter.lora_dropout.register_forward_hook(lambda *_: seen.append(1))
    adapter(draw(5, 33))
    assert seen == [1] and not calls


def test_a_base_layer_with_a_forward_of_its_own_is_called(calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    adapter = scattered(Doubled(33, 20))
    base = adapter.base_layer
    want = 2 * nn.functional.linear(draw(5, 33), base.weight, base.bias)
    nn.init.zeros_(adapter.lora_B)
    assert torch.equal(adapter(draw(5, 33)), want) and not calls


def test_a_base_weight_that_trains_gets_its_gradient():
    adapter = scattered(nn.Linear(33, 20))
    adapter.base_layer.weight.requires_grad_(True)
    adapter(draw(5, 33)).sum().backward()
    assert adapter.base_layer.weight.grad.abs().max() > 0


def test_a_base_bias_that_trains_gets_its_gradient(calls):
    adapter = scattered(nn.Linear(33, 20), lora_bias=True)
    adapter.base_layer.bias.requires_grad_(True)
    adapter(draw(5, 33)).sum().backward()
    assert torch.equal(adapter.base_layer.bias.grad, torch.full((20,), 5.0)) and len(calls) == 1
    torch.testing.assert_close(adapter.lora_bias.grad, torch.full((20,), 5 * adapter.scaling))


def test_adapters_on_adapters_and_other_formulas_go_the_plain_way(calls):
    inner = scattered(nn.Linear(33, 20))
    outer = scattered(inner)
    close(outer(draw(5, 33)), plain_way(inner, draw(5, 33)) + outer.update(draw(5, 33)), 4e-6)
    assert len(calls) == 1  # the inner one

    class Half(LoRALinear):
        def update(self, x):
            return super().update(x) / 2

    half = Half(nn.Linear(33, 20).requires_grad_(False), LoraConfig(r=R, lora_alpha=7))
    nn.init.normal_(half.lora_B)
    want = half.base_layer(draw(5, 33)) + LoRALinear.update(half, draw(5, 33)) / 2
    assert torch.equal(half(draw(5, 33)), want) and len(calls) == 1


def test_a_wrong_dtype_is_the_layers_own_error():
    with pytest.raises(RuntimeError, match="dtype"):
        scattered(nn.Linear(33, 20))(draw(5, 33, dtype=torch.bfloat16))


@every_base
@pytest.mark.parametrize("has_bf16", [False, True], ids=["without bf16", "with bf16"])
def test_autocast_casts_as_torch_does(build, has_bf16, calls, monkeypatch):
    monkeypatch.setattr(ops, "cpu_has_bf16", lambda: has_bf16)
    adapter, x = scattered(build()), draw(5, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = adapter(x)
    got.float().square().sum().backward()
    want, twin = adapter(y := draw(5, 33)), x.grad
    want.square().sum().backward()
    assert got.dtype == torch.bfloat16 and x.grad.dtype == adapter.lora_A.grad.dtype == torch.float32
    close(got.float(), want, 3e-2)
    close(twin, y.grad, 3e-2)
    assert len(calls) == 2


@every_base
def test_compiles_as_one_graph(build):
    adapter = scattered(build())
    torch._dynamo.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    x, twin = draw(2, 5, 33), draw(2, 5, 33)
    got, want = compiled(x), adapter(twin)
    close(got, want, 4e-6)
    for out in (got, want):
        out.square().sum().backward()
    close(x.grad, twin.grad, 8e-6)


def test_torch_func_sees_the_plain_formula():
    adapter, x = scattered(nn.Linear(33, 20)), draw(5, 33, grad=False)
    parameters = {name: p.detach() for name, p in adapter.named_parameters() if p.requires_grad}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(adapter, p, (x,)).square().sum())(parameters)
    adapter(x).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            close(gradients[name], parameter.grad, 4e-6)


# --- frozen layers of a model on a processor without bf16 products ---


@pytest.fixture
def slow_cpu(monkeypatch):
    monkeypatch.setattr(ops, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(layers, "cpu_has_bf16", lambda: False)


CONFIG = LoraConfig(r=R, lora_alpha=7, target_modules=["first", "mid"])


def kinds(model):
    return {path: type(module) for path, module in model.named_modules()}


def test_other_frozen_layers_multiply_in_fp32_and_are_given_back(make_mlp, slow_cpu, calls):
    model = make_mlp().bfloat16()
    before = kinds(model)
    minilora.get_peft_model(model, CONFIG)
    assert (
        isinstance(model.last, Frozen) and isinstance(model.last, nn.Linear) and type(model.last).__name__ == "Linear"
    )
    x = draw(3, 12, dtype=torch.bfloat16)
    model(x).float().sum().backward()
    assert len(calls) == 3 and x.grad.abs().max() > 0
    with model.disable_adapter():
        model(x)
    assert len(calls) == 6
    model = model.unload()
    assert kinds(model) == before


def test_merging_for_good_gives_them_back(make_mlp, slow_cpu, randomize):
    model = minilora.get_peft_model(make_mlp().bfloat16(), CONFIG)
    randomize(model)
    model.merge_and_unload()
    assert not [path for path, module in model.named_modules() if isinstance(module, Frozen)]


def test_a_processor_with_bf16_keeps_its_layers(make_mlp, monkeypatch):
    monkeypatch.setattr(layers, "cpu_has_bf16", lambda: True)
    model = make_mlp().bfloat16()
    before = kinds(model)
    minilora.inject(model, CONFIG)
    assert type(model.last) is before["last"]


def test_the_result_is_the_same_layer_with_less_rounding(slow_cpu, calls):
    model = nn.Sequential(nn.Linear(33, 20)).bfloat16().requires_grad_(False)
    x = draw(5, 33, dtype=torch.bfloat16)
    exact = nn.functional.linear(x.double(), model[0].weight.double(), model[0].bias.double())
    layers.in_front(model.modules())
    got = model(x)
    assert len(calls) == 1 and got.dtype == torch.bfloat16
    close(got.double(), exact, 2**-8)


def test_autocast_reaches_frozen_layers_too(slow_cpu, calls):
    model = nn.Sequential(nn.Linear(33, 20)).requires_grad_(False)
    layers.in_front(model.modules())
    x = draw(5, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    got.float().sum().backward()
    assert len(calls) == 1 and got.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    close(got.float(), model(x), 2**-6)


def test_a_frozen_layer_that_is_made_to_train_gets_its_gradient(slow_cpu, calls):
    model = nn.Sequential(nn.Linear(33, 20)).bfloat16()
    layers.in_front(model.modules())
    model(draw(5, 33, dtype=torch.bfloat16)).float().sum().backward()
    assert model[0].weight.grad is not None and not calls


@pytest.mark.parametrize("again", ["deepcopy", "pickle"])
def test_copies_are_such_layers_too(again, slow_cpu):
    model = nn.Sequential(nn.Linear(33, 20)).bfloat16().requires_grad_(False)
    layers.in_front(model.modules())
    if again == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = draw(5, 33, dtype=torch.bfloat16)
    assert type(twin[0]) is type(model[0]) and torch.equal(twin(x), model(x))
    assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()


# ---- what models and users do with a layer


def adapted(layer, **fields):
    model = nn.Sequential(layer)
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **fields))
    return model.train()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24)], ids=str)
def test_the_output_may_be_written_to(shape, dtype, packed):
    """As models do with ReLU(inplace=True), and with residuals."""
    grads = []
    for inplace in (False, True):
        torch.manual_seed(2)
        base = nn.Linear(24, 10).to(dtype)
        model = adapted(QuantLinear.from_linear(base, QuantConfig()) if packed else base)
        x = torch.randn(shape).to(dtype)
        out = torch.relu(model(x) + 1) if not inplace else model(x).add_(1).relu_()
        out.float().sum().backward()
        grads.append((out.detach(), model[0].lora_A.grad, model[0].lora_B.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


def test_autocast_leaves_fp64():
    model, x = adapted(nn.Linear(24, 10)).double(), torch.randn(3, 24, dtype=torch.float64)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on the first use of forward mode
def test_forward_mode_and_tracing_take_the_plain_way():
    model, x = adapted(nn.Linear(24, 10)).eval(), torch.randn(3, 24)
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, model(x + 1) - model(x), rtol=1e-4, atol=1e-4)


def test_parts_of_other_dtypes_are_cast_without_grad_too():
    model, x = adapted(nn.Linear(24, 10)), torch.randn(3, 24)
    model[0].lora_B.data = model[0].lora_B.data.bfloat16()
    wanted = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_forward_of_a_subclass_of_the_packed_layer_is_called():
    calls = []

    class Counting(QuantLinear):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    base = QuantLinear.from_linear(nn.Linear(24, 10), QuantConfig())
    base.__class__ = Counting
    model, x = adapted(base), torch.randn(3, 24)
    calls.clear()
    torch.testing.assert_close(model(x), QuantLinear.forward(base, x) + model[0].update(x))
    assert calls == [x.shape]


def test_a_class_that_was_extended_after_injection_is_left_alone():
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 10)).half()
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    torch.nn.utils.parametrizations.weight_norm(model[1])
    x = torch.randn(3, 24).half()
    wanted = model(x)
    unload(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-2, atol=1e-2)
