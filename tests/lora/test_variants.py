"""Each variant against its own formula in float64, and what it saves, shares, freezes and refuses."""

import copy
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora
from minilora import LoraConfig, MiniLoraError, QuantConfig, QuantLinear, inject, load_adapter, merge, save_adapter
from minilora.errors import CheckpointError, ConfigError, StateError, TargetError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import VARIANTS, register
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of
from minilora.lora.variants.embedding import LoRAEmbedding, TiedHead
from minilora.lora.variants.loftq import calibrated, loftq
from minilora.lora.variants.tokens import TokenRows
from minilora.lora.variants.vera import drawn, shared_factor
from minilora.many.adapted import disabled, unload
from minilora.quant.blockwise import quantize
from minilora.store.adapter_files import read_config
from minilora.store.load import WEIGHTS_FILE, adapter_state_dict
from minilora.training.optim import lora_plus_groups
from tests.compare import close, same
from tests.models import Conv1D, adapted_paths

IN, OUT, R, ALPHA = 40, 24, 4, 12
S = ALPHA / R
F64, BF16 = torch.float64, torch.bfloat16


def make_base(kind="linear", dtype=torch.float32):
    torch.manual_seed(5)
    layer = (Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)).to(dtype)
    nn.init.normal_(layer.bias, std=0.5)
    layer.requires_grad_(False)
    return QuantLinear.from_linear(layer, QuantConfig(double_quant=True)) if kind == "nf4" else layer.eval()


every_base = pytest.mark.parametrize("base", ["linear", "conv1d", "nf4"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)


def config(targets=("layer",), **fields):
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": targets, **fields})


def make(base="linear", variant=None, dtype=torch.float32, **fields):
    """``(model, adapter)`` of one adapted layer."""
    layer = make_base(base, dtype) if isinstance(base, str) else base
    model = inject(nn.ModuleDict({"layer": layer}).eval(), config(**fields), variant=variant)
    return model, model["layer"]


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (6,)), IN, generator=torch.Generator().manual_seed(9)).to(dtype)


def content(module):
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


def low_rank(adapter):
    return adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()


# ---- DoRA


@every_base
def test_dora_row_norms_are_those_of_the_dense_sum(base, randomize):
    model, adapter = make(base, use_dora=True)
    randomize(model)
    dense = dense_weight(adapter.innermost).double() + low_rank(adapter)
    close(adapter.row_norms(), dense.norm(dim=1), 1e-6)


@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_dora_row_norms_in_half_precision_do_not_drown_in_a_large_bias(base, randomize):
    layer = make_base(base, BF16)
    with torch.no_grad():
        layer.bias.mul_(200)
    model, adapter = make(layer, use_dora=True)
    randomize(model)
    dense = dense_weight(layer).double() + low_rank(adapter)
    close(adapter.row_norms(), dense.norm(dim=1), 1e-2)


@every_base
@every_dtype
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_starts_with_a_ratio_of_exactly_one(base, dtype, rslora):
    model, adapter = make(base, dtype=dtype, use_dora=True, use_rslora=rslora)
    ratio = adapter.lora_magnitude_vector / adapter.row_norms()
    assert torch.equal(ratio, torch.ones(OUT))
    x = inputs(dtype=dtype)
    with disabled(model):
        want = model["layer"](x)
    assert torch.equal(model["layer"](x), want)


@every_base
def test_dora_gradients_hold_the_norm_constant(base, randomize):
    model, adapter = make(base, use_dora=True)
    randomize(model)
    x, cotangent = inputs(7), torch.randn(7, OUT, generator=torch.Generator().manual_seed(2))
    (adapter(x) * cotangent).sum().backward()
    G = cotangent.double().T @ x.double()

    W = dense_weight(adapter.innermost).double()
    A, B, m = (
        p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector)
    )
    V = W + S * B @ A
    V.retain_grad()
    c = V.norm(dim=1).detach()
    (F.linear(x.double(), (m / c)[:, None] * V) * cotangent).sum().backward(retain_graph=True)

    close(V.grad, (m / c)[:, None] * G, 1e-10)  # the reference is the formula of the paper
    close(adapter.lora_magnitude_vector.grad, (G * V / c[:, None]).sum(1))
    close(adapter.lora_magnitude_vector.grad, m.grad)
    close(adapter.lora_A.grad, A.grad)
    close(adapter.lora_B.grad, B.grad)
    free = torch.autograd.grad((G * m[:, None] * V / V.norm(dim=1, keepdim=True)).sum(), B)[0]
    assert (free - B.grad).norm() > 0.1 * B.grad.norm(), "not told apart from the gradient through the norm"


@every_base
def test_rows_merged_from_dora_have_the_norms_of_the_magnitude(base, randomize):
    model, adapter = make(base, use_dora=True)
    randomize(model)
    with torch.no_grad():
        adapter.lora_magnitude_vector.abs_().add_(0.5)
    merge(model)
    close(dense_weight(model["layer"]).double().norm(dim=1), adapter.lora_magnitude_vector)


class Shapes(TorchDispatchMode):
    """The shapes of all floating tensors that operations give back, views of parameters apart."""

    def __init__(self, known=()):
        super().__init__()
        self.made, self.known = set(), {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.made.add((tuple(each.shape), each.is_floating_point()))
        return result


def step_shapes(model, adapter, x):
    with Shapes(model.parameters()) as shapes:
        adapter(x).square().sum().backward()
    return {shape for shape, floating in shapes.made if floating}


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "vera"])
def test_no_dense_update_is_formed_in_a_step(base, variant, randomize):
    model, adapter = make(base, variant)
    randomize(model).train()
    shapes = step_shapes(model, adapter, inputs(3))
    assert ((R,) if variant == "vera" else (R, IN)) in shapes, "the gradients must have been seen"
    assert not shapes & {(OUT, IN), (IN, OUT)}


def test_dora_decodes_no_whole_packed_weight_in_a_step(randomize, monkeypatch):
    monkeypatch.setattr("minilora.linear.ops._ROWS", 1 << 9)  # slices of 12 rows and not the whole layer
    model, adapter = make("nf4", "dora")
    randomize(model).train()
    with Shapes(model.parameters()) as shapes:
        adapter(inputs(3)).square().sum().backward()
    largest = max(torch.Size(shape).numel() for shape, floating in shapes.made if floating)
    assert OUT * R <= largest < OUT * IN
    with Shapes() as dense:
        adapter.delta_weight()
    assert ((OUT, IN), True) in dense.made, "what is looked for can be found"


# ---- PiSSA and OLoRA


def best_rank(W, r):
    U, Sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :r] * Sigma[:r] @ Vh[:r]


@every_base
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_from_the_best_part_of_its_rank(base, rslora):
    _, adapter = make(base, init_lora_weights="pissa", use_rslora=rslora)
    assert adapter.scaling == (ALPHA / R**0.5 if rslora else S)
    W = dense_weight(adapter.innermost)
    close(low_rank(adapter), best_rank(W, R))
    gram_A, gram_B = adapter.lora_A @ adapter.lora_A.T, adapter.lora_B.T @ adapter.lora_B
    close(gram_A, gram_B)  # the singular values go half into each
    close(gram_A, torch.diag(torch.linalg.svdvals(W.float())[:R] / adapter.scaling))


@every_base
def test_olora_starts_from_the_first_columns_of_qr(base):
    _, adapter = make(base, init_lora_weights="olora")
    Q, upper = torch.linalg.qr(dense_weight(adapter.innermost).double())
    close(adapter.lora_B.double() @ adapter.lora_A.double(), Q[:, :R] @ upper[:R])
    close(adapter.lora_B.T @ adapter.lora_B, torch.eye(R))
    assert torch.equal(adapter.lora_A[:, :R], adapter.lora_A[:, :R].triu())


@every_base
@every_dtype
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_a_residual_variant_learnt_is_the_distance_from_its_start(base, dtype, init, randomize):
    model, adapter = make(base, dtype=dtype, init_lora_weights=init)
    start, x = low_rank(adapter).detach(), inputs(dtype=dtype)
    with disabled(model):
        kept, plain = content(model), model["layer"](x)
    assert torch.equal(model["layer"](x), plain)
    randomize(model)
    close(adapter.delta_weight(), low_rank(adapter) - start)
    W = dense_weight(adapter.innermost).double() + low_rank(adapter) - start
    close(adapter(x), F.linear(x.double(), W, adapter.bias.double()), 3e-2 if dtype == BF16 else 1e-5)
    with disabled(model):
        assert same(content(model), kept) and torch.equal(model["layer"](x), plain)


def test_the_randomized_pissa_is_close_to_the_exact_one():
    layer = make_base()
    U, _, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
    layer.weight.data = U * 0.7 ** torch.arange(OUT) @ Vh
    exact, quick = (make(copy.deepcopy(layer), init_lora_weights=init)[1] for init in ("pissa", "pissa_niter_8"))
    close(low_rank(quick), low_rank(exact), 1e-2)
    assert not torch.equal(quick.lora_A, exact.lora_A)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_residual_variant_comes_back_from_its_file(init, randomize, tmp_path):
    model, adapter = make(init_lora_weights=init)
    randomize(model)
    save_adapter(model, tmp_path)
    assert {key.rsplit(".", 2)[1] for key in safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)} == {
        "lora_A",
        "lora_B",
    }
    again = nn.ModuleDict({"layer": make_base()}).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again["layer"](inputs()), adapter(inputs()))


# ---- orthogonal


@every_base
def test_an_orthogonal_start_is_zero_with_both_factors_alive(base):
    _, adapter = make(base, init_lora_weights="orthogonal")
    A, B = adapter.lora_A.double(), adapter.lora_B.double()
    assert (B @ A).abs().max() < 1e-6 * A.norm() * B.norm()
    for factor in (A, B):
        spectrum = torch.linalg.svdvals(factor.detach())
        assert spectrum[R // 2] < 1e-5 * spectrum[R // 2 - 1], "half of the rank each"
    adapter(inputs()).square().sum().backward()
    assert adapter.lora_A.grad.norm() > 0.01 and adapter.lora_B.grad.norm() > 0.01


def test_an_orthogonal_start_of_odd_rank_is_refused(snapshot):
    model = nn.ModuleDict({"layer": make_base()})
    before = snapshot(model)
    for fields in ({"r": 3}, {"r": 4, "rank_pattern": {"layer": 3}}):
        with pytest.raises(ConfigError, match=r"to be even, got 3 instead. Set r=4"):
            inject(model, config(init_lora_weights="orthogonal", **fields))
    assert snapshot(model) == before
    inject(model, config(init_lora_weights="orthogonal", r=3, rank_pattern={"layer": 4}))  # none is odd
    assert model["layer"].r == 4


# ---- LoftQ


def loftq_error(W, packed, A, B, scaling):
    return (W.double() - packed.dequantize(torch.float32).double() - scaling * B.double() @ A.double()).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_loftq_is_nearer_than_plain_quantization_and_keeps_its_best_turn(dtype):
    W = make_base().weight.to(dtype)
    plain = (W.double() - quantize(W, QuantConfig()).dequantize(torch.float32).double()).norm().item()
    errors = [loftq_error(W, *loftq(W, QuantConfig(), R, S, rounds), S) for rounds in range(1, 9)]
    assert errors[0] < 0.9 * plain
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_does_not_depend_on_alpha(rslora):
    updates = []
    for alpha in (2, 12, 64):
        _, adapter = make(
            init_lora_weights="loftq", lora_alpha=alpha, use_rslora=rslora, loftq_config={"loftq_iter": 3}
        )
        updates.append((low_rank(adapter), adapter.innermost.codes))
    for update, codes in updates[1:]:
        close(update, updates[0][0], 1e-4)
        assert torch.equal(codes, updates[0][1])


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@every_dtype
def test_loftq_packs_the_base_of_its_slot(base, dtype, randomize, tmp_path):
    dense, x = make_base(base, dtype), inputs(dtype=dtype)
    want = dense(x)
    model, adapter = make(base, dtype=dtype, init_lora_weights="loftq", loftq_config={"loftq_iter": 4})
    inner = adapter.innermost
    assert isinstance(inner, QuantLinear) and inner.dtype == dtype and torch.equal(inner.bias, dense.bias)
    assert not any(p.requires_grad for p in inner.parameters())
    plain = QuantLinear.from_linear(dense, QuantConfig())
    assert (adapter(x) - want).double().norm() < 0.9 * (plain(x) - want).double().norm()
    with disabled(model):
        assert model["layer"] is inner
    randomize(model)
    save_adapter(model, tmp_path)
    again = nn.ModuleDict({"layer": copy.deepcopy(inner)}).eval()
    load_adapter(again, tmp_path)
    assert isinstance(again["layer"], VARIANTS["loftq"])
    assert torch.equal(again["layer"](x), adapter(x)) and torch.equal(again["layer"].innermost.weight, inner.weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loftq_has_two_three_and_four_bits(bits):
    W = make_base().weight
    _, adapter = make(init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 4})
    assert adapter.innermost.format == f"nf{bits}" and adapter.innermost.book.bits == bits
    plain = (W - quantize(W, QuantConfig(f"nf{bits}")).dequantize()).norm()
    _, once = make(init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 1})
    errors = [(W - dense_weight(a.innermost) - a.delta_weight()).norm() for a in (adapter, once)]
    assert errors[0] < errors[1] < plain and errors[0] < 0.9 * plain


@pytest.mark.parametrize("bits", [2, 3])
def test_loftq_weighed_by_its_inputs_disturbs_the_output_less(bits):
    """Inputs of very uneven size: the error that counts is that of the output."""
    x = inputs() * torch.logspace(-1.5, 1.0, IN)
    importance, dense = {"layer": x.reshape(-1, IN).square().mean(0)}, make_base()
    fields = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits, "loftq_iter": 3}}
    _, plain = make(**fields)
    with calibrated(importance):
        _, heavy = make(**fields)
    _, after = make(**fields)
    assert torch.equal(after.lora_A, plain.lora_A)  # the block is over
    with calibrated({"elsewhere": torch.ones(IN)}), pytest.raises(MiniLoraError, match="layer: calibrated"):
        make(**fields)
    with calibrated({"layer": torch.zeros(IN)}):  # a layer behind a dead unit
        assert make(**fields)[1].lora_A.isfinite().all()
    error = [(adapter(x) - dense(x)).norm().item() for adapter in (plain, heavy)]
    assert error[1] < 0.7 * error[0]


def test_a_calibrated_loftq_adapter_is_loaded_on_the_same_calibration_only(randomize, tmp_path):
    """On another one the base would be packed otherwise than it was trained."""
    importance = {"layer": torch.rand(IN) + 0.1}
    fields = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 2}}
    with calibrated(importance):
        model, adapter = make(**fields)
    randomize(model)
    save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="another calibration"):
        load_adapter(nn.ModuleDict({"layer": make_base()}).eval(), tmp_path)
    with calibrated({"layer": torch.ones(IN)}), pytest.raises(CheckpointError, match="another calibration"):
        load_adapter(nn.ModuleDict({"layer": make_base()}).eval(), tmp_path)
    dense, packed = (
        nn.ModuleDict({"layer": layer}).eval() for layer in (make_base(), copy.deepcopy(adapter.innermost))
    )
    with calibrated(importance):
        load_adapter(dense, tmp_path)
    load_adapter(packed, tmp_path)
    for again in (dense, packed):
        assert torch.equal(again["layer"](inputs()), adapter(inputs()))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_loftq_adapter_makes_up_for_its_own_codes_only(bits, randomize, snapshot, tmp_path):
    """Beside a base that was packed plainly it would add a correction of another error, and nobody would notice."""
    model, _ = make(init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 2})
    randomize(model)
    save_adapter(model, tmp_path)
    plain = nn.ModuleDict({"layer": QuantLinear.from_linear(make_base(), QuantConfig(f"nf{bits}"))}).eval()
    before = snapshot(plain)
    with pytest.raises(
        CheckpointError, match="layer is packed otherwise than the adapter packed it; load it onto the dense model"
    ):
        load_adapter(plain, tmp_path)
    assert snapshot(plain) == before
    load_adapter(plain, tmp_path, allow_other_base=True)


def test_loftq_on_a_packed_layer_is_refused_when_new(snapshot):
    """It would be plain LoRA without a word; a saved one may be loaded there."""
    model = nn.ModuleDict({"layer": make_base("nf4")})
    before = snapshot(model)
    with pytest.raises(TargetError, match="layer: is packed already"):
        inject(model, config(init_lora_weights="loftq"))
    assert snapshot(model) == before


def test_loftq_under_a_layer_that_carries_an_adapter_is_refused(randomize, snapshot):
    """It would pack the base that the first adapter was trained on."""
    model, _ = make()
    randomize(model)
    before, want = snapshot(model), model["layer"](inputs())
    with pytest.raises(MiniLoraError, match=r"layer.*LoftQ"):
        inject(model, config(init_lora_weights="loftq"), "second", activate=False)
    assert snapshot(model) == before and torch.equal(model["layer"](inputs()), want)


# ---- VeRA


class Several(nn.Module):
    """Two layers of one shape and one of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two, self.other = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(6, 9)
        self.eval()

    def forward(self, x):
        return self.other(torch.tanh(self.one(x) - self.two(x)))


def test_layers_of_vera_take_parts_of_the_same_two_matrices():
    model = inject(Several(), config(["one", "two", "other"], r=3), variant="vera")
    assert torch.equal(model.one.shared_A, model.two.shared_A) and torch.equal(model.one.shared_B, model.two.shared_B)
    assert model.one.shared_A.shape == (3, 10) and model.other.shared_B.shape == (9, 3)
    assert torch.equal(model.one.shared_A[:, :6], model.other.shared_A)
    assert torch.equal(model.other.shared_B[:6], model.one.shared_B)
    assert torch.equal(model.one.shared_A, drawn(0, 3, 10, 9)[0]) and model.one.projections is model.other.projections
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "vera_lambda_b", "vera_lambda_d"}  # fmt: skip
    assert all(torch.equal(getattr(model, name).vera_lambda_d, torch.full((3,), 0.1)) for name in ("one", "two"))


def test_vera_draws_the_same_factors_in_every_process():
    code = "from minilora.lora.variants.vera import drawn; import torch; torch.manual_seed(7); print(drawn(5, 3, 10, 9)[1].tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.manual_seed(123)
    assert torch.equal(torch.tensor(json.loads(printed)), drawn(5, 3, 10, 9)[1])
    for factor, bound in ((drawn(0, 3, 10, 9)[0], (6 / 10) ** 0.5), (shared_factor(3, 10), (6 / 10) ** 0.5)):
        assert 0.8 * bound < factor.abs().max() <= bound


def test_vera_does_not_move_the_generator_of_the_user():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    shared_factor(5, 17)
    drawn(9, 5, 17, 13)
    assert torch.equal(torch.rand(2), want)


def test_a_vera_file_holds_two_vectors_a_layer_and_the_two_matrices(randomize, tmp_path):
    model = inject(Several(), config(["one", "other"], r=3), variant="vera")
    randomize(model)
    x = torch.randn(4, 10)
    d, b = model.one.vera_lambda_d.double(), model.one.vera_lambda_b.double()
    A, B = drawn(0, 3, 10, 9)
    want = b[:, None] * B[:6].double() @ (d[:, None] * A.double())
    close(model.one.delta_weight(), want)
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    sizes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in tensors.items()}
    assert sizes == {"one.vera_lambda_d": (3,), "one.vera_lambda_b": (6,), "other.vera_lambda_d": (3,),
                     "other.vera_lambda_b": (9,), "base_model.vera_A": (3, 10), "base_model.vera_B": (9, 3)}  # fmt: skip
    again = Several()
    load_adapter(again, tmp_path, "other-name")
    assert adapters_of(again).variants == {"other-name": "vera"} and type(again.one) is VARIANTS["vera"]
    assert torch.equal(again(x), model(x))


# ---- LoRA-FA, a bias on B


def test_lora_fa_never_trains_a(tmp_path):
    model, adapter = make("linear", "lora_fa")
    model.train()
    start = adapter.lora_A.detach().clone()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["layer.lora_B"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model["layer"](inputs()).square().sum().backward()
        optimizer.step()
    assert adapter.lora_A.grad is None and torch.equal(adapter.lora_A, start)
    assert adapter.lora_B.abs().max() > 0.1
    save_adapter(model, tmp_path)
    again = nn.ModuleDict({"layer": make_base()})
    load_adapter(again, tmp_path, is_trainable=True)
    minilora.set_adapter(again, "default")
    assert adapters_of(again).variants["default"] == "lora_fa"
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["layer.lora_B"]
    assert torch.equal(again["layer"].lora_A, start)


@every_base
@every_dtype
def test_lora_bias_is_scaled_and_merged(base, dtype, randomize):
    model, adapter = make(base, dtype=dtype, lora_bias=True)
    x = inputs(dtype=dtype)
    with disabled(model):
        plain, kept = model["layer"](x), content(model)
    if base == "conv1d" and dtype == torch.bfloat16:  # this Conv1D rounds before it adds its bias
        torch.testing.assert_close(adapter(x), plain, rtol=2**-7, atol=2**-7)
    else:
        assert torch.equal(adapter(x), plain)
    randomize(model)
    shift = S * adapter.lora_bias.double()
    assert shift.abs().max() > 0.1
    W = dense_weight(adapter.innermost).double() + low_rank(adapter)
    want = F.linear(x.double(), W, adapter.innermost.bias.double() + shift)
    close(adapter(x), want, 3e-2 if dtype == BF16 else 1e-5)
    close(adapter.bias, adapter.innermost.bias.double() + shift, 1e-2)  # what a model sees that reads it
    merge(model)
    close(model["layer"](x), want, 3e-2 if dtype == BF16 else 1e-5)
    close(model["layer"].bias, adapter.innermost.bias.double() + shift, 1e-2)
    minilora.unmerge(model)
    with disabled(model):
        assert same(content(model), kept)


def test_lora_bias_gives_a_layer_without_bias_one(randomize):
    layer = nn.Linear(IN, OUT, bias=False)
    model, adapter = make(layer, lora_bias=True)
    randomize(model)
    want = adapter(inputs())
    merge(model)
    close(model["layer"](inputs()), want)
    close(model["layer"].bias, S * adapter.lora_bias)
    assert layer.bias is None


# ---- embeddings, token rows, tied heads


class Scaled(nn.Embedding):
    """As in Gemma: the rows are multiplied by a constant."""

    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


class Words(nn.Module):
    """A table of 9 tokens and a head with a bias, tied or not."""

    def __init__(self, table=nn.Embedding, tied=False, bias=True):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.inner, self.head = table(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=bias)
        if tied:
            self.head.weight = self.table.weight
        self.eval()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.table(ids))))


IDS = torch.arange(9)


@pytest.mark.parametrize("table", [nn.Embedding, Scaled])
@every_dtype
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_an_embedding_changes_its_rows(table, dtype, rslora, randomize):
    model = Words(table).to(dtype)
    plain, scale = model.table(IDS), getattr(table, "embed_scale", 1.0)
    inject(model, config(["table"], r=2, lora_alpha=6, use_rslora=rslora))
    adapter = model.table
    assert isinstance(adapter, LoRAEmbedding) and torch.equal(adapter(IDS), plain)
    assert adapter.lora_embedding_A.abs().max() == 0 < adapter.lora_embedding_B.abs().max()
    randomize(model)
    factor = 6 / 2**0.5 if rslora else 3
    update = factor * (adapter.lora_embedding_B.double() @ adapter.lora_embedding_A.double()).T
    want = scale * (dense_weight(adapter.innermost).double() + update)
    tolerance = 3e-2 if dtype == BF16 else 1e-5
    got = adapter(IDS)
    assert got.dtype == dtype
    close(got, want, tolerance)
    close(adapter(IDS.view(3, 3)).view(9, 6), want, tolerance)
    merge(model)
    close(model.table(IDS), want, tolerance)
    minilora.unmerge(model)
    with disabled(model):
        assert torch.equal(model.table(IDS), plain)


@pytest.mark.parametrize("table", [nn.Embedding, Scaled])
@every_dtype
def test_token_rows_change_these_rows_only(table, dtype, randomize, tmp_path):
    model = Words(table).to(dtype)
    plain = model.table(IDS)
    inject(model, config(["inner"], trainable_token_indices=[7, 2]))
    assert isinstance(model.table, TokenRows) and torch.equal(model.table(IDS), plain)
    randomize(model)
    got, scale = model.table(IDS), getattr(table, "embed_scale", 1.0)
    others = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(got[others], plain[others])
    assert torch.equal(got[[7, 2]], model.table.trainable_tokens_delta.to(dtype) * scale)
    assert [tuple(p.shape) for p in own_parameters(model.table)] == [(2, 6)]
    model(IDS).sum().backward()
    assert model.table.trainable_tokens_delta.grad.abs().amin(1).min() > 0
    want = model(IDS)
    save_adapter(model, tmp_path)
    again = Words(table).to(dtype)
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), want)
    merge(model)
    close(model(IDS), want, 3e-2 if dtype == BF16 else 1e-5)
    unload(model, keep_merged=True)
    assert torch.equal(model.table.weight[others], Words(table).to(dtype).table.weight[others])


@pytest.mark.parametrize("bias", [False, True])
def test_token_rows_of_a_tied_head_change_its_logits_alike(bias, randomize):
    model = Words(tied=True, bias=bias)
    plain = model(IDS)
    inject(model, config(["inner"], r=3, trainable_token_indices=[7, 2]))
    close(model(IDS), plain, 1e-6)
    randomize(model)
    assert sum(p.shape == (2, 6) for p in model.parameters()) == 1, "the head trains nothing of its own"
    h = torch.tanh(model.inner(model.table(IDS)))
    weight = Words().table.weight.detach().clone()
    weight[[7, 2]] = model.table.trainable_tokens_delta.detach()
    close(model.head(h), F.linear(h, weight, model.head.bias))
    want = model(IDS)
    merge(model)
    close(model(IDS), want)
    assert model.head.weight is model.table.weight


@pytest.mark.parametrize("token", [9, 40])
def test_a_token_that_is_not_in_the_table_is_refused(token, snapshot):
    model = Words()
    before = snapshot(model)
    with pytest.raises(TargetError, match=f"token {token} is not in table, which has 9 rows"):
        inject(model, config(["inner"], trainable_token_indices=[1, token]))
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_on_a_tied_embedding_is_refused_or_shared(family, make_gpt2, make_llama, ids, randomize, snapshot):
    build = {"gpt2": make_gpt2, "llama": lambda: make_llama(tie_word_embeddings=True)}[family]
    name = {"gpt2": "wte", "llama": "embed_tokens"}[family]
    model = build()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = snapshot(model)
    with pytest.raises(TargetError, match=rf"{name} shares its weight with lm_head.*ensure_weight_tying.*untie"):
        inject(model, config([name]))
    assert snapshot(model) == before

    plain = model(ids).logits
    inject(model, config([name], ensure_weight_tying=True))
    table, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(table, LoRAEmbedding) and isinstance(head, TiedHead) and not list(own_parameters(head))
    assert torch.equal(model(ids).logits, plain)
    randomize(model)
    h = torch.randn(3, table.in_features)
    close(head(h), F.linear(h, dense_weight(table.innermost) + table.delta_weight()))
    want = model(ids).logits
    assert (want - plain).abs().max() > 0.1
    merge(model)
    close(model(ids).logits, want)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    minilora.unmerge(model)
    with disabled(model):
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_untie_gives_the_head_a_weight_of_its_own(family, make_gpt2, make_llama, ids, randomize):
    model = make_gpt2() if family == "gpt2" else make_llama(tie_word_embeddings=True)
    name, plain = {"gpt2": "wte", "llama": "embed_tokens"}[family], model(ids).logits
    assert minilora.untie(model) is model
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is False and torch.equal(model(ids).logits, plain)
    head = model.lm_head
    inject(model, config([name]))
    randomize(model)
    want = model(ids).logits
    assert model.lm_head is head
    merge(model)
    close(model(ids).logits, want)


def test_untie_reaches_a_head_inside_a_larger_model(randomize):
    model = nn.ModuleDict(
        {"eye": nn.Linear(5, 6), "text": nn.ModuleDict({"table": nn.Embedding(11, 6), "head": nn.Linear(6, 11)})}
    )
    model["text"]["head"].weight = model["text"]["table"].weight
    model.config = SimpleNamespace(
        text_config=SimpleNamespace(tie_word_embeddings=True), decoder=SimpleNamespace(tie_word_embeddings=True)
    )
    inject(model, config(["head"]))
    randomize(model)
    with pytest.raises(StateError, match=r"text\.head shares its weight with text\.table.*untie.*exclude_modules"):
        merge(model)
    want = model["text"]["head"](torch.ones(1, 6))
    minilora.untie(model)
    assert not model.config.text_config.tie_word_embeddings and not model.config.decoder.tie_word_embeddings
    merge(model)
    close(model["text"]["head"](torch.ones(1, 6)), want)


def test_untie_leaves_an_untied_model_alone(make_llama, snapshot):
    model = make_llama()
    before = snapshot(model)
    assert snapshot(minilora.untie(model)) == before


@pytest.mark.parametrize("fields", [{"init_lora_weights": "loftq"}, {"lora_bias": True}], ids=str)
def test_what_an_embedding_does_not_take(fields, snapshot):
    model = Words()
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"table.* Embedding"):
        inject(model, config(["table", "inner"], **fields))
    assert snapshot(model) == before


# ---- LoRA+


def test_lora_plus_takes_every_trainable_once():
    model = inject(
        Words(), config(["table", "inner"], lora_bias=False, bias="all", modules_to_save=["head"], use_rslora=True)
    )
    inject(model, config(["inner"], use_dora=True), "second")
    minilora.set_adapter(model, ["default", "second"])
    slow, fast = lora_plus_groups(model, 0.01, 8.0)
    assert (slow["lr"], fast["lr"]) == (0.01, 0.08)
    listed = [id(p) for group in (slow, fast) for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    names = {id(p): name.rsplit(".", 1)[-1] for name, p in model.named_parameters()}
    assert {names[id(p)] for p in fast["params"]} == {"lora_B", "lora_embedding_B"}
    assert not {names[id(p)] for p in slow["params"]} & {"lora_B", "lora_embedding_B"}
    torch.optim.AdamW([slow, fast])


@pytest.mark.parametrize(("lr", "ratio"), [(0, 2), (-1, 2), (0.1, 0), (True, 2), (0.1, "2"), (float("nan"), 2)])
def test_lora_plus_wants_rates(lr, ratio):
    with pytest.raises(ConfigError, match="wanted a number > 0"):
        lora_plus_groups(make()[0], lr, ratio)


def test_lora_plus_without_anything_to_train():
    with pytest.raises(StateError, match="nothing would train"):
        lora_plus_groups(make_base(), 0.1)


@pytest.mark.parametrize("ratio", [4.0, 16.0])
def test_lora_plus_is_plain_lora_with_another_scale_of_a(ratio):
    """With Adam and no epsilon only signs and shapes of gradients count; powers of two make every rounding equal."""
    root = ratio**0.5
    models = [make(make_base())[0] for _ in range(2)]
    plus, plain = (model["layer"] for model in models)
    with torch.no_grad():
        plain.lora_A.copy_(plus.lora_A * root)
    options = {"betas": (0.9, 0.999), "eps": 1e-38, "weight_decay": 0.0}
    lr = 2.0**-10
    first = torch.optim.Adam(lora_plus_groups(models[0], lr, ratio), **options)
    second = torch.optim.Adam([plain.lora_A, plain.lora_B], lr=lr * root, **options)
    goal = torch.randn(6, OUT, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        for adapter, optimizer in ((plus, first), (plain, second)):
            optimizer.zero_grad()
            F.mse_loss(adapter(inputs()), goal).backward()
            optimizer.step()
    close(plain.lora_A, plus.lora_A * root)
    close(plain.lora_B, plus.lora_B / root)
    close(plain.delta_weight(), plus.delta_weight())
    assert plus.lora_B.abs().max() > 0.01


# ---- layers_to_transform


@pytest.mark.parametrize("layers", [1, [1]])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_layers_to_transform_names_layers(make_llama, layers, pattern):
    model = inject(make_llama(), config(["q_proj", "down_proj"], layers_to_transform=layers, layers_pattern=pattern))
    assert adapted_paths(model) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def test_layers_to_transform_with_all_linear_and_several(make_gpt2):
    model = inject(make_gpt2(n_layer=3), config("all-linear", layers_to_transform=[2, 0], layers_pattern="h"))
    assert {path.split(".")[2] for path in adapted_paths(model)} == {"0", "2"} and len(adapted_paths(model)) == 8


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"layers_to_transform": [0, 2]}, TargetError, "layers_to_transform: 2 is not there; .* layers 0 to 1"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, TargetError, "layers_to_transform: 0 is not there"),
        ({"layers_pattern": "layers"}, ConfigError, "does nothing alone"),
        ({"layers_to_transform": [-1]}, ConfigError, "wanted a layer index"),
        (
            {"layers_to_transform": 0, "target_modules": ".*q_proj"},
            ConfigError,
            "cannot be used when `target_modules` is a str",
        ),
    ],
)
def test_layers_that_are_not_there_are_refused(make_llama, snapshot, fields, error, match):
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        inject(
            model, config(**{"targets": ["q_proj"], **fields}) if "target_modules" not in fields else config(**fields)
        )
    assert snapshot(model) == before


def test_layers_to_transform_come_back_from_the_file(make_llama, randomize, ids, tmp_path):
    model = inject(make_llama(), config(["q_proj"], layers_to_transform=[1], layers_pattern=["layers"]))
    randomize(model)
    save_adapter(model, tmp_path)
    again = make_llama()
    load_adapter(again, tmp_path)
    assert adapted_paths(again) == ["model.layers.1.self_attn.q_proj"]
    assert torch.equal(again(ids).logits, model(ids).logits)


# ---- choosing and writing a variant


# Two start from data (test_starts.py), and an activated adapter wants the tokens of a call (parity/test_peft_alora.py).
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"corda", "lora_ga", "alora"}))
def test_inject_takes_a_variant_by_name(name, tmp_path, randomize):
    base = "linear" if name == "loftq" else "nf4"  # it packs the layer itself
    model, adapter = make(base, name)
    assert type(adapter) is VARIANTS[name] and adapters_of(model).variants == {"default": name}
    randomize(model)
    save_adapter(model, tmp_path)
    with safetensors.safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        # A variant that a field of the config means is said by that field, so that PEFT reads it too.
        config = read_config(tmp_path)
        assert config.variant == (name if name not in ("lora_fa", "lora_xs") else "lora")
        assert file.metadata() == {"format": "pt"} | ({} if name == config.variant else {"minilora_variant": name})
    again = nn.ModuleDict({"layer": make_base(base)}).eval()
    load_adapter(again, tmp_path)
    assert type(again["layer"]) is VARIANTS[name] and torch.equal(again["layer"](inputs()), adapter(inputs()))


def test_an_activated_adapter_by_name_wants_its_invocation(snapshot):
    model = nn.ModuleDict({"layer": make_base()})
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"wants its invocation; give alora_invocation_tokens="):
        inject(model, config(), variant="alora")
    assert snapshot(model) == before


def test_an_unknown_variant_is_named(snapshot):
    model = nn.ModuleDict({"layer": make_base()})
    before = snapshot(model)
    with pytest.raises(ConfigError, match="variant 'doar' is not registered; known are 'dora'"):
        inject(model, config(), variant="doar")
    assert snapshot(model) == before


@pytest.fixture
def hadamard():
    """A variant in a few lines: the update is gated row by row."""

    @register("gated")
    class Gated(LoRALinear):
        file_names = LoRALinear.file_names | {"gate": "lora_gate"}

        def __init__(self, base_layer, config, path=""):
            super().__init__(base_layer, config, path)
            self.gate = nn.Parameter(torch.ones(self.out_features, device=self.weight.device))

        def forward(self, x):
            return self.base_layer(x) + self.update(self.lora_dropout(x)) * self.gate.to(x.dtype)

        def delta_weight(self):
            return self.gate[:, None].float() * super().delta_weight()

        def as_lora(self):
            A, B = super().as_lora()
            return A, self.gate[:, None].float() * B

    yield Gated
    del VARIANTS["gated"]


@every_base
@every_dtype
def test_a_variant_of_ones_own_obeys_the_law(hadamard, base, dtype, randomize, tmp_path):
    model, adapter = make(base, "gated", dtype)
    x, tolerance = inputs(dtype=dtype), 3e-2 if dtype == BF16 else 1e-5
    with disabled(model):
        assert torch.equal(adapter(x), model["layer"](x))
    randomize(model)
    W = dense_weight(adapter.innermost).double() + adapter.gate.double()[:, None] * low_rank(adapter)
    want = F.linear(x.double(), W, adapter.bias.double())
    got = adapter(x)
    close(got, want, tolerance)
    merge(model)
    close(model["layer"](x), want, tolerance)
    minilora.unmerge(model)
    assert torch.equal(model["layer"](x), got)
    assert "base_model.model.layer.lora_gate" in adapter_state_dict(model)
    save_adapter(model, tmp_path)
    again = nn.ModuleDict({"layer": make_base(base, dtype)}).eval()
    load_adapter(again, tmp_path)
    assert type(again["layer"]) is hadamard and torch.equal(again["layer"](x), got)


def test_a_taken_name_is_kept_by_its_owner(hadamard):
    with pytest.raises(ConfigError, match="'gated' is taken by Gated"):
        register("gated")(VARIANTS["dora"])
    assert VARIANTS["gated"] is hadamard


def test_a_variant_of_ones_own_is_gone_afterwards():
    assert "gated" not in VARIANTS


def test_a_variant_whose_update_depends_on_the_input_is_not_merged(snapshot):
    class Moody(LoRALinear):
        def delta_weight(self):
            raise StateError("Moody: its update depends on the input")

    VARIANTS["moody"] = Moody
    try:
        model, _ = make("linear", "moody")
        before = snapshot(model)
        with pytest.raises(StateError, match="depends on the input"):
            merge(model)
        assert snapshot(model) == before
    finally:
        del VARIANTS["moody"]


def test_mica_writes_into_the_minor_directions_and_keeps_them():
    base = make_base()
    model, adapter = make(base, init_lora_weights="mica")
    U = torch.linalg.svd(dense_weight(adapter.innermost).double(), full_matrices=False).U[:, -adapter.r :]
    close(adapter.lora_B @ adapter.lora_B.T, U @ U.T)
    assert adapter.lora_A.requires_grad and not adapter.lora_A.any() and not adapter.lora_B.requires_grad
    minilora.inject(model, LoraConfig(r=2, target_modules=adapted_paths(model)), "other")
    minilora.set_adapter(model, "default")
    assert adapter.lora_A.requires_grad and not adapter.lora_B.requires_grad


def test_mica_wants_a_rank_that_the_weight_has():
    with pytest.raises(ConfigError, match="MiCA requires `r` <= min"):
        make(make_base(), r=999, init_lora_weights="mica")


# ---- token rows beside other adapters


def token_model(first, second, tied=False):
    """Adapters "a" and "b" on a model of a table, a layer and a head, their values random."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(11, 6), "mid": nn.Linear(6, 9), "head": nn.Linear(6, 11)}).eval()
    model.get_input_embeddings, model.get_output_embeddings = lambda: model["table"], lambda: model["head"]
    if tied:
        model["head"].weight = model["table"].weight
    for at, (name, fields) in enumerate((("a", first), ("b", second))):
        inject(model, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["mid"], **fields}), name)
        for value in adapters_of(model).named(name).values():
            for parameter in own_parameters(value):
                parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)) * 0.4)
    return model


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["table", "head"])
@pytest.mark.parametrize(
    "second", [{"trainable_token_indices": {"table": [2, 7]}}, {"target_modules": ["mid", "table"]}], ids=str
)
def test_token_rows_and_another_adapter_add_up(order, tied, place, second):
    """Active together they are the sum of their updates, whichever came first, where they used to be the last one only."""
    more = {} if tied else {"head": [1, 4]}
    other = {**second, "ensure_weight_tying": tied}
    model = token_model({"trainable_token_indices": {"table": [1, 4], **more}}, other, tied)
    adapters = adapters_of(model)
    minilora.set_adapter(model, list(order))
    slot = adapters.slots[place]
    update = sum(value.delta_weight() for value in slot.kept.values())
    whole = slot.base.weight.double() + update.double()
    ids, x = torch.arange(11), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    if place == "table":
        close(model["table"](ids), whole)
    else:
        close(model["head"](x), x.double() @ whole.T + slot.base.bias.double())


@pytest.mark.parametrize("tied", [False, True])
def test_one_row_that_two_adapters_train_is_refused(tied):
    rows = {"trainable_token_indices": {"table": [1, 4]}}, {"trainable_token_indices": {"table": [4, 7]}}
    model = token_model(*rows, tied=tied)
    for call in (lambda: minilora.set_adapter(model, ["a", "b"]), lambda: merge(model, ["a", "b"])):
        with pytest.raises(StateError, match=r"adapters 'a' and 'b': both train token 4; .*undefined merging behavior"):
            call()
    assert adapters_of(model).active == ("b",) and not adapters_of(model).merged


def test_rows_of_a_module_that_is_copied_whole_are_refused():
    with pytest.raises(TargetError, match="The embedding layer is already marked to be trained fully"):
        token_model({"trainable_token_indices": {"table": [1]}, "modules_to_save": ["table"]}, {})
