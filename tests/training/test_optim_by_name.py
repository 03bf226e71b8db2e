"""SGD, Muon and LoRA-FA as optimizers of a run: their steps beside a slow twin or torch's own classes, what they leave alone and refuse."""

import copy
import math

import pytest
import torch
from torch import nn

from minilora.errors import ConfigError, MissingPackageError
from minilora.lora.slots import adapters_in
from minilora.training.optim_choice import as_trained, optimizer_of, refuse_optimizer
from minilora.training.optim_muon import MuonWithAdamW
from minilora.training.optim_state import put_state, state_bytes, state_tensors
from minilora.training.settings import TrainConfig
from tests.compare import close
from tests.training.test_resume import as_if_killed_after, files_of, fresh, run

STEPS, LR, DECAY = 20, 0.03, 0.2
MIXED = {"use_dora": True, "target_modules": ["embed", "mid", "head"], "lora_alpha": 7}  # factors, rows, magnitudes
EVERY = ["sgd", "muon", "lora_fa"]


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def made(model, name, **fields):
    """``(what trains, the optimizer)`` that a run would have, and for LoRA-FA a model whose A is frozen for good."""
    config = TrainConfig(**({"optimizer": name, "lr": LR, "weight_decay": DECAY} | fields))
    with as_trained(model, config):
        named = trained(model)
        optimizer = optimizer_of(model, named, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    return named, optimizer


def random_gradients(named, step):
    draw = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw) * (1 + step % 3)


def stepped(named, optimizer, steps=range(STEPS)):
    for step in steps:
        random_gradients(named, step)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in named.items()}


# ---- their steps


def test_sgd_is_a_ball_that_rolls():
    model = fresh(**MIXED)
    named, optimizer = made(model, "sgd")
    twin = {name: [p.detach().double(), torch.zeros_like(p, dtype=torch.float64)] for name, p in named.items()}
    for step in range(STEPS):
        random_gradients(named, step)
        for name, parameter in named.items():
            weight, speed = twin[name]
            speed.mul_(0.9).add_(parameter.grad.double() + DECAY * weight)
            weight.sub_(LR * speed)
        optimizer.step()
    for name, parameter in named.items():
        close(parameter, twin[name][0], 1e-5)


def newton_schulz(M):
    """Jordan's iteration on ``[rows, columns]``, rows <= columns."""
    X = M / M.norm()
    for _ in range(5):
        G = X @ X.T
        X = 3.4445 * X + (-4.7750 * G + 2.0315 * G @ G) @ X
    return X


def test_muon_steps_along_all_directions_of_the_momentum():
    torch.manual_seed(0)
    for shape in ((3, 40), (26, 3)):
        parameter = nn.Parameter(torch.randn(shape))
        before, momentum = parameter.detach().double(), torch.zeros(shape, dtype=torch.float64)
        optimizer = MuonWithAdamW([{"params": [parameter], "lr": LR}], [], weight_decay=DECAY)
        for step in range(STEPS):
            random_gradients({"one": parameter}, step)
            momentum.lerp_(parameter.grad.double(), 0.05)
            ahead = parameter.grad.double().lerp(momentum, 0.95)
            way = newton_schulz(ahead) if shape[0] <= shape[1] else newton_schulz(ahead.T).T
            before = before * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(max(shape)) * way
            optimizer.step()
        close(parameter, before, 2e-2)  # torch's iteration is in bf16


def test_muon_has_the_factors_and_adamw_all_else():
    model = fresh(**MIXED)
    twin = copy.deepcopy(model)
    named, optimizer = made(model, "muon")
    other = trained(twin)
    of_muon = [name for name in other if name.endswith(("lora_A", "lora_B"))]
    assert {name for name, p in named.items() if optimizer.is_muons(p)} == set(of_muon)
    rest = [name for name in other if name not in of_muon]
    assert {name.rpartition(".")[2] for name in rest} >= {
        "lora_magnitude_vector",
        "lora_embedding_A",
        "lora_embedding_B",
    }
    muon = torch.optim.Muon([other[name] for name in of_muon], LR, DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([other[name] for name in rest], LR, weight_decay=DECAY)
    stepped(named, optimizer)
    for step in range(STEPS):
        random_gradients(other, step)
        muon.step()
        adamw.step()
    for name, parameter in named.items():
        assert torch.equal(parameter, other[name]), name


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """So that one rate is right for both."""
    sizes = {}
    for name in ("adamw", "muon"):
        model = fresh(r=8)
        before = {key: p.detach().clone() for key, p in trained(model).items()}
        after = stepped(*made(model, name, weight_decay=0.0), range(5))
        sizes[name] = {key: (after[key] - before[key]).square().mean().sqrt() / 5 / LR for key in after}
    for key in sizes["muon"]:
        assert 0.1 < sizes["muon"][key] < 0.4 < sizes["adamw"][key] * 2 < 2, key


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_lora_plus_is_a_rate_of_b(name):
    moved = {}
    for ratio in (1, 4):
        model = fresh(init_lora_weights=False)
        before = {key: p.detach().clone() for key, p in trained(model).items()}
        named, optimizer = made(model, name, loraplus_lr_ratio=ratio, weight_decay=0.0)
        assert {group["lr_ratio"] for group in optimizer.param_groups} == {1, ratio}
        after = stepped(named, optimizer, [1])
        moved[ratio] = {key: (after[key] - before[key]).norm().item() for key in after}
    for key in moved[1]:
        assert moved[4][key] == pytest.approx((4 if key.endswith("lora_B") else 1) * moved[1][key], rel=1e-3), key


def test_lora_fa_in_float64():
    """Its step is AdamW's of ``g_B (A A^T)^-1 / s^2``; what has no A beside it gets AdamW's own."""
    model = fresh(bias="all", use_rslora=True, init_lora_weights="gaussian")
    named, optimizer = made(model, "lora_fa", weight_decay=0.0)
    assert not any(name.endswith("lora_A") for name in named)
    layers = {id(layer.lora_B): layer for layer in adapters_in(model) if hasattr(layer, "lora_B")}
    twin = {name: [p.detach().double(), 0, 0] for name, p in named.items()}
    for step in range(STEPS):
        random_gradients(named, step)
        for name, parameter in named.items():
            grad, (weight, mean, square) = parameter.grad.double(), twin[name]
            if layer := layers.get(id(parameter)):
                A = layer.lora_A.double()
                grad = grad @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(len(A))) / layer.scaling**2
            mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
            size = LR * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            twin[name] = [weight - size * mean / (square.sqrt() + 1e-6), mean, square]
        optimizer.step()
    for name, parameter in named.items():
        close(parameter, twin[name][0], 1e-4)


# ---- their state


@pytest.mark.parametrize("name", EVERY)
def test_a_state_is_put_back_to_the_same_bits(name):
    model, other = fresh(**MIXED), fresh(**MIXED)
    named, optimizer = made(model, name)
    stepped(named, optimizer, range(4))
    kept = state_tensors(optimizer, named)
    assert state_bytes(optimizer) == sum(tensor.nbytes for tensor in kept.values())
    again, second = made(other, name)
    put_state(second, again, {key: tensor.clone() for key, tensor in kept.items()})
    for key, parameter in again.items():
        parameter.data.copy_(named[key].data)
    got, want = stepped(again, second, range(4, 9)), stepped(named, optimizer, range(4, 9))
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
def test_muon_with_adamw_is_one_optimizer(copied):
    """A rate that is set, a state that is loaded and a copy reach both parts."""
    model = fresh(**MIXED)
    named, optimizer = made(model, "muon")
    stepped(named, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    if copied:
        other, again = copy.deepcopy((named, optimizer))
    else:
        other, again = made(copy.deepcopy(model), "muon", lr=0.5)
        again.load_state_dict(state)
    assert again.state_dict().keys() == state.keys() and len(again.state) == len(named)
    for each in (optimizer, again):
        for group in each.param_groups:
            group["lr"] = 0.07
    want, got = stepped(named, optimizer, range(3, 6)), stepped(other, again, range(3, 6))
    assert all(torch.equal(got[key], want[key]) for key in want)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = 0.0
    still = stepped(named, optimizer, [6])
    assert all(torch.equal(still[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("fields", "lora"),
    [
        ({"optimizer": "muon", "loraplus_lr_ratio": 4}, {"use_dora": True}),
        ({"optimizer": "lora_fa"}, {"target_modules": ["embed", "mid"], "bias": "all"}),
        ({"optimizer": "sgd", "riemannian_reg": 0.01}, {"lora_bias": True}),
    ],
    ids=lambda value: value.get("optimizer", ""),
)
def test_a_run_of_more_than_factors_goes_on_to_the_same_bits(tmp_path, fields, lora):
    run(fresh(**lora), tmp_path / "whole", save_every=1, keep_checkpoints=99, **fields)
    as_if_killed_after(4, tmp_path / "whole", tmp_path / "half")
    run(fresh(seed=8, **lora), tmp_path / "half", resume=True, save_every=1, **fields)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")
    last = "checkpoint-9/optimizer.safetensors"
    assert (tmp_path / "half" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


# ---- what LoRA-FA leaves alone


def test_a_run_of_lora_fa_freezes_a_until_it_ends(tmp_path):
    model, seen = fresh(target_modules=["embed", "mid"]), []
    before, flags = content(model), [p.requires_grad for p in model.parameters()]
    run(model, tmp_path, optimizer="lora_fa", steps=3, watch=lambda record: seen.append(list(trained(model))))
    after = content(model)
    still = {name for name in after if torch.equal(after[name], before[name])}
    assert {name for name in still if "lora" in name} == {"mid.lora_A", "embed.lora_embedding_B"}
    assert all(names == ["embed.lora_embedding_A", "mid.lora_B"] for names in seen) and seen
    assert [p.requires_grad for p in model.parameters()] == flags


def content(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "variant", "lora", "words"),
    [
        ("lora_fa", "vera", {}, "no lora_B trains beside a lora_A"),
        ("lora_fa", "lora_xs", {}, "no lora_B trains beside a lora_A"),
        ("lora_fa", None, {"init_lora_weights": "mica"}, "no lora_B trains beside a lora_A"),
        ("muon", "vera", {}, "no matrix lora_A or lora_B trains here"),
        ("muon", None, {"target_modules": ["embed"]}, "no matrix lora_A or lora_B trains here"),
    ],
)
def test_an_adapter_that_has_nothing_for_it_is_refused(tmp_path, name, variant, lora, words):
    model = fresh(variant=variant, **lora)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match=f"optimizer='{name}': {words}"):
        run(model, tmp_path / "run", optimizer=name)
    assert [p.requires_grad for p in model.parameters()] == before and not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("fields", [{"loraplus_lr_ratio": 4}, {"riemannian_reg": 0.01}], ids=str)
def test_lora_fa_has_no_a_for_what_looks_at_both(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"{name}=.*wants an A that trains, and optimizer='lora_fa' freezes it"):
        TrainConfig(optimizer="lora_fa", **fields)


def test_a_torch_without_muon_is_refused(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MissingPackageError, match=r"optimizer='muon' is torch.optim.Muon, which torch .* has not"):
        run(fresh(), tmp_path / "run", optimizer="muon")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    with pytest.raises(MissingPackageError, match="take adamw"):  # before a model is loaded
        refuse_optimizer(TrainConfig(optimizer="muon"), torch.device("cpu"))
    for name in ("lora_fa", "sgd", "adamw"):
        refuse_optimizer(TrainConfig(optimizer=name), torch.device("cpu"))
