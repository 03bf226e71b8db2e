"""LoRA+ and Riemannian preconditioning as settings of a run: what they change, and that such a run goes on to the same bits."""

import pytest
import torch

from minilora import lora_plus_groups
from minilora.errors import ConfigError
from minilora.training.optim_choice import optimizer_of
from minilora.training.optim_riemannian import factor_pairs, precondition
from minilora.training.settings import TrainConfig
from tests.training.test_resume import as_if_killed_after, files_of, fresh, run

BOTH_RANDOM = {"init_lora_weights": False, "lora_dropout": 0.0}
ONE = {"steps": 1, "warmup": 0.0, "weight_decay": 0.0, "clip": 0.0, "lr": 1e-3}


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8"])
def test_the_first_step_of_b_is_so_many_times_that_of_a(tmp_path, optimizer):
    """Adam's first step is the rate for every number, whatever its gradient."""
    model = fresh(**BOTH_RANDOM)
    before = factors(model)
    run(model, tmp_path, optimizer=optimizer, loraplus_lr_ratio=4, **ONE)
    for name, after in factors(model).items():
        moved, rate = (after - before[name]).abs().max().item(), 4e-3 if name.endswith("lora_B") else 1e-3
        assert moved == pytest.approx(rate, rel=1e-2), name


def test_the_groups_are_those_of_the_library():
    model = fresh(target_modules=["embed", "mid"], lora_bias=False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = optimizer_of(model, named, TrainConfig(lr=1e-3, loraplus_lr_ratio=16)).param_groups
    theirs = lora_plus_groups(model, 1e-3, 16)
    for one, other in zip(ours, theirs, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]] and one["lr"] == other["lr"]
        assert one["lr_ratio"] * 1e-3 == other["lr"]


def test_the_gradients_are_rescaled_before_the_step(tmp_path, monkeypatch):
    seen = []
    model = fresh(**BOTH_RANDOM)
    real = torch.optim.SGD

    def sgd(config, parameters, fast=()):
        return real([{"params": list(parameters), "lr_ratio": 1.0}], lr=config.lr)

    import minilora.training.optim_choice as module

    monkeypatch.setattr(module, "make_optimizer", sgd)
    plain = fresh(**BOTH_RANDOM)
    for one, reg in ((model, 0.5), (plain, 0.0)):
        before = factors(one)
        optimizer = optimizer_of(one, dict(one.named_parameters()), TrainConfig(lr=0.5, riemannian_reg=reg))
        torch.manual_seed(3)
        for parameter in one.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        if not reg:
            precondition(factor_pairs(one), 0.5)
        optimizer.step()
        seen.append({name: before[name] - after for name, after in factors(one).items()})
    for name, moved in seen[0].items():
        torch.testing.assert_close(moved, seen[1][name])


@pytest.mark.parametrize(
    "fields",
    [{"loraplus_lr_ratio": 8}, {"riemannian_reg": 0.01}, {"loraplus_lr_ratio": 8, "optimizer": "adamw8"}],
    ids=str,
)
def test_such_a_run_goes_on_to_the_same_bits(tmp_path, fields):
    fields = fields | {"lr": 0.003}
    run(fresh(), tmp_path / "whole", save_every=1, keep_checkpoints=99, **fields)
    as_if_killed_after(4, tmp_path / "whole", tmp_path / "half")
    run(fresh(seed=8), tmp_path / "half", resume=True, **fields)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")
    run(fresh(), tmp_path / "plain", lr=0.003)
    assert files_of(tmp_path / "plain") != files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio=0"),
        ({"loraplus_lr_ratio": 2000}, "leaves the rate of B under 1"),
        ({"riemannian_reg": -1}, "riemannian_reg=-1"),
        ({"riemannian_reg": float("nan")}, "riemannian_reg=nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**fields)


@pytest.mark.parametrize(("name", "value"), [("loraplus_lr_ratio", 4), ("riemannian_reg", 0.1)])
def test_an_adapter_that_has_not_these_factors_is_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}.*trains here"):
        run(fresh(variant="vera"), tmp_path / "run", **{name: value})
    assert not (tmp_path / "run" / "log.jsonl").exists()
