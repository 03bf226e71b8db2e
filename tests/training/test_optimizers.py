"""Optimizers by name: AdamW in 8 bits as bitsandbytes' reference has it, and each of them in a run that is gone on with."""

import importlib
import math
import sys

import pytest
import torch

import minilora
from minilora import AdamW8bit, LoraConfig, inject
from minilora.errors import CheckpointError, ConfigError, MissingPackageError, StateError
from minilora.quant.codebooks import dynamic_map
from minilora.training import optim_adamw8
from minilora.training.checkpoint import read_checkpoint
from minilora.training.loop import TrainConfig, train
from minilora.training.optim import make_optimizer
from minilora.training.optim_state import state_bytes
from tests.models import Words
from tests.training.test_resume import EXAMPLES, LORA, PAD, files_of

SHAPES = [(67, 129), (4096,), (4097,), (3, 5, 300), (4095,), (7,), (1,)]  # whole blocks, a block of one, and in fp32


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def gradient(shape, step, dtype=torch.float32):
    """Of rows that differ by decades, with zeros among them, and in one step nothing but zeros."""
    draw = torch.Generator().manual_seed(100 + step)
    value = torch.randn(shape, generator=draw) * 10.0 ** -(step % 4)
    value.view(-1)[::7] *= 1e-5
    value.view(-1)[256:512] = 0
    return (value * (step != 5)).to(dtype)


def take_steps(optimizer, some, steps, dtype=torch.float32):
    for step in steps:
        for parameter in some:
            parameter.grad = gradient(parameter.shape, step, dtype)
        optimizer.step()


# ---- the code


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_level_is_found_beside_every_border(signed):
    levels, thresholds = dynamic_map(signed), optim_adamw8._thresholds(signed)
    near = [thresholds, (levels[1:] + levels[:-1]) / 2]
    for _ in range(6):
        near += [torch.nextafter(near[-2], torch.tensor(2.0)), torch.nextafter(near[-1], torch.tensor(-2.0))]
    values = torch.cat([*near, levels, torch.linspace(-1, 1, 20_001), torch.tensor([0.0, -0.0, 1e-45, -1e-45])])
    wanted = (values[:, None] - levels).abs().argmin(1)
    assert torch.equal(optim_adamw8._nearest(values, signed).long(), wanted)


@pytest.mark.parametrize("signed", [True, False])
def test_the_first_bits_leave_one_threshold_at_most(signed):
    first = torch.arange(1 << 17) << 15
    ends = [
        torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)
        for bits in (first, first | 0x7FFF)
    ]
    low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    thresholds = optim_adamw8._thresholds(signed)
    codes = [torch.bucketize(end, thresholds) for end in (low, high)]
    assert ((codes[1] - codes[0])[~low.isnan()] <= 1).all()


# ---- the steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_steps_are_those_of_bitsandbytes_reference(dtype, decay, monkeypatch):
    pytest.importorskip("triton")
    kernels = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim")
    monkeypatch.setattr(optim_adamw8, "_CHUNK", 1024)  # several parts of a parameter
    own, theirs = parameters(dtype), [parameter.detach().clone() for parameter in parameters(dtype)]
    optimizer = AdamW8bit(own, lr=1e-3, weight_decay=decay, min_8bit_size=0)
    states = [
        [torch.zeros(p.shape, dtype=torch.uint8) for _ in "12"]
        + [torch.zeros(math.ceil(p.numel() / 256)) for _ in "12"]
        for p in theirs
    ]
    maps = dynamic_map(True), dynamic_map(False)
    with torch.compiler.set_stance("force_eager"):
        for step in range(1, 21):
            take_steps(optimizer, own, [step], dtype)
            for parameter, (one, two, scale1, scale2) in zip(theirs, states, strict=True):
                kernels.optimizer_update_8bit_blockwise_pytorch(
                    parameter, gradient(parameter.shape, step, dtype), one, two, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-3,
                    *maps, scale1, scale2, decay, 1.0, False, optimizer_name="adam",
                )  # fmt: skip
            for mine, other, state in zip(own, theirs, states, strict=True):
                kept = [
                    optimizer.state[mine][key]
                    for key in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
                ]
                assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True)), (step, mine.shape)
                assert torch.equal(mine, other), (step, mine.shape)


def test_a_step_stays_near_that_of_exact_adamw():
    own, exact = parameters(), parameters()
    optimizers = AdamW8bit(own, lr=1e-3, weight_decay=0.1), torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.1)
    draw = torch.Generator().manual_seed(5)
    for _ in range(5):
        for mine, other in zip(own, exact, strict=True):
            mine.grad = torch.randn(mine.shape, generator=draw).abs().add(0.3)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, start in zip(own, exact, parameters(), strict=True):
        off, moved = (mine - other).norm(), (other - start).norm()
        assert 0 < off < 0.02 * moved if mine.numel() >= 4096 else off < 1e-4 * moved


def test_a_number_far_below_its_block_is_stepped_too_far():
    """The limit that the docstring names, which bit-equality to bitsandbytes keeps."""
    grad = torch.ones(4096)
    grad[1::2] = 1e-4  # its square is 1e-8 of the largest, and rounds to zero
    own, exact = (torch.nn.Parameter(torch.zeros(4096)) for _ in "12")
    for parameter, make in ((own, AdamW8bit), (exact, torch.optim.AdamW)):
        optimizer = make([parameter], lr=1e-3)
        for factor in (1, 1, 1, 0):  # at last a batch that says nothing of these numbers
            parameter.grad = grad.clone()
            parameter.grad[1::2] *= factor
            optimizer.step()
    assert (own[::2] - exact[::2]).abs().max() < 1e-4 and (own[1::2] / exact[1::2] > 10).all()


def test_bytes_of_a_parameter():
    some = parameters()
    optimizer = AdamW8bit(some)
    take_steps(optimizer, some, [1])
    for parameter in some:
        held = sum(value.nbytes for value in optimizer.state[parameter].values())
        assert (held - 4) / parameter.numel() < 2.05 if parameter.numel() >= 4096 else held == 8 * parameter.numel() + 4
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert state_bytes(optimizer) == kept < 2.3 * sum(p.numel() for p in some if p.numel() >= 4096) + 8 * 4200
    plain = parameters()
    exact = torch.optim.AdamW(plain)
    take_steps(exact, plain, [1])
    assert state_bytes(exact) == sum(value.nbytes for state in exact.state.values() for value in state.values())


def test_a_parameter_that_does_not_lie_in_one_piece():
    start = torch.randn(70, 90)
    across, straight = torch.nn.Parameter(start.clone().T), torch.nn.Parameter(start.T.contiguous())
    assert not across.is_contiguous()
    for parameter in (across, straight):
        parameter.grad = gradient(parameter.shape, 1)
        AdamW8bit([parameter]).step()
    assert torch.equal(across, straight) and not torch.equal(straight, start.T)


def test_the_loss_of_a_closure_comes_back():
    parameter = torch.nn.Parameter(torch.ones(9))

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert AdamW8bit([parameter]).step(closure) == 9 and (parameter < 1).all()


# ---- going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_loaded_goes_on_to_the_same_bits(dtype, tmp_path):
    whole, parts = parameters(dtype), parameters(dtype)
    take_steps(AdamW8bit(whole), whole, range(1, 9), dtype)
    first = AdamW8bit(parts)
    take_steps(first, parts, range(1, 5), dtype)
    torch.save(first.state_dict(), tmp_path / "state")
    second = AdamW8bit(parts, lr=0.5)
    second.load_state_dict(torch.load(tmp_path / "state"))
    take_steps(second, parts, range(5, 9), dtype)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def other_states():
    def stepped(make):
        some = parameters()
        optimizer = make(some)
        take_steps(optimizer, some, [1])
        return optimizer.state_dict()

    yield "torch's AdamW", stepped(torch.optim.AdamW)
    yield "another size", stepped(lambda some: AdamW8bit(some, min_8bit_size=0))
    yield "other parameters", stepped(lambda some: AdamW8bit(some[::-1]))


@pytest.mark.parametrize("case", ["torch's AdamW", "another size", "other parameters"])
def test_another_state_is_refused(case):
    some = parameters()
    optimizer = AdamW8bit(some)
    take_steps(optimizer, some, [1])
    before = {key: value.clone() for key, value in optimizer.state[some[0]].items()}
    with pytest.raises(StateError, match=r"wanted that of an AdamW8bit|is of another optimizer"):
        optimizer.load_state_dict(dict(other_states())[case])
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[some[0]].items())


def run(folder, optimizer, resume=False, seed=1, steps=6, say=print, **fields):
    torch.manual_seed(seed)
    model = inject(Words(), LoraConfig(**(LORA | {"r": 130})))  # lora_A and lora_B of more than 4,096 numbers
    config = TrainConfig(steps=steps, batch_size=2, lr=0.02, weight_decay=0.1, optimizer=optimizer, **fields)
    return train(model, EXAMPLES, config, folder, PAD, resume=resume, say=say)


ON_A_CPU = ["adamw", "adamw8", "sgd", "muon", "lora_fa", "adamw8bit_bnb"]


@pytest.mark.parametrize("optimizer", ON_A_CPU)
def test_a_run_goes_on_to_the_same_bits(optimizer, tmp_path, monkeypatch):
    if optimizer.endswith("bnb"):
        pytest.importorskip("bitsandbytes")
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(whole, optimizer, save_every=2, keep_checkpoints=9)
    half.mkdir()
    (whole / "checkpoint-2").rename(half / "checkpoint-2")
    run(half, optimizer, resume=True, seed=8, save_every=2)
    assert files_of(half) == files_of(whole)
    assert (half / "checkpoint-6/optimizer.safetensors").read_bytes() == (
        whole / "checkpoint-6/optimizer.safetensors"
    ).read_bytes()
    kinds = {tensor.dtype for tensor in read_checkpoint(half / "checkpoint-4", 4).optimizer.values()}
    assert (torch.uint8 in kinds) == ("8" in optimizer)


def test_another_optimizer_is_another_run(tmp_path):
    run(tmp_path, "adamw", save_every=2)
    with pytest.raises(CheckpointError, match="schedule: optimizer is adamw8, in the checkpoint adamw; set it back"):
        run(tmp_path, "adamw8", resume=True)


def test_a_largest_magnitude_below_zero_is_damage(tmp_path):
    from minilora.files.parse import parse_tensors, tensor_bytes
    from tests.training.test_hostile_runs import seal

    run(tmp_path, "adamw8", save_every=6)
    file = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    tensors, _ = parse_tensors(bytearray(file.read_bytes()), file)
    name = next(key for key in tensors if key.startswith("exp_avg_sq_absmax/"))
    file.write_bytes(tensor_bytes(tensors | {name: -tensors[name]}, {}))
    seal(file.parent)
    with pytest.raises(CheckpointError, match="holds what no run leaves"):
        read_checkpoint(file.parent, 6)


# ---- by name


def made(optimizer, some=None):
    return make_optimizer(TrainConfig(optimizer=optimizer, lr=0.02, weight_decay=0.1), some or parameters())


def test_the_names():
    assert type(made("adamw")) is torch.optim.AdamW and type(made("adamw8")) is AdamW8bit is minilora.AdamW8bit
    for name in ("adamw", "adamw8"):
        group = made(name).param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.02, 0.1) and not group.get("fused")
    with pytest.raises(ConfigError, match=r"optimizer='adam': wanted one of adamw, adamw8, "):
        TrainConfig(optimizer="adam")


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_fused_one():
    some = [torch.nn.Parameter(torch.randn(4, 5, device="cuda"))]
    assert made("adamw", some).param_groups[0]["fused"]


@pytest.mark.parametrize("name", ["paged_adamw8bit", "paged_adamw32bit"])
def test_pages_are_for_a_gpu(name):
    with pytest.raises(
        ConfigError, match=f"optimizer='{name}': bitsandbytes has it for cuda, and the adapter is on cpu; adamw8 is"
    ):
        made(name)


def test_bitsandbytes_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MissingPackageError, match="optimizer='adamw8bit_bnb' is bitsandbytes', which is not installed; run 'pip"
    ):
        made("adamw8bit_bnb")


def test_a_refused_optimizer_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError):
        run(tmp_path / "run", "paged_adamw8bit")
    assert not (tmp_path / "run").exists()


def test_bitsandbytes_own(tmp_path):
    pytest.importorskip("bitsandbytes")
    assert type(made("adamw8bit_bnb")) is importlib.import_module("bitsandbytes").optim.AdamW8bit


def test_a_gradient_that_is_sparse():
    table = torch.nn.Embedding(9, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(StateError, match="a gradient that is sparse or complex"):
        AdamW8bit(table.parameters()).step()


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"eps": math.nan}, {"betas": (0.9, 1.0)}, {"min_8bit_size": -1}])
def test_a_setting_that_cannot_be_meant(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AdamW8bit(parameters(), **options)
