"""The law of sweeps: every trial ends with the adapter that it would have by itself."""

import csv
import dataclasses
import json
import os
import signal

import pytest
import torch

from minilora import LoraConfig, inject, load_adapter, quantize_model
from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, Interrupted, StateError
from minilora.lab import Result, Trial, sweep, trials_of
from minilora.lora.starts import LoraGAConfig
from minilora.qlora.kbit import checkpoint_activations
from minilora.store.save import adapter_state_dict
from minilora.training.loop import TrainConfig, train
from tests import models

STEPS = 50


def example(length, seed):
    drawn = torch.randint(2, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(tuple(drawn), (-100, -100, *drawn[2:]))


EXAMPLES = [example(5 + number * 7 % 13, number) for number in range(23)]
HELD_OUT = [example(6 + number, 100 + number) for number in range(5)]


def base(kind="dense", bias=True):
    model = models.llama(0, attention_bias=bias)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind == "packed":
        quantize_model(model)
    return model


def lora(**fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": "all-linear", **fields})


def plan(**fields):
    return TrainConfig(**{"steps": STEPS, "lr": 5e-3, "batch_size": 3, "pack": "off", **fields})


def alone(model, trial, folder):
    """The run of its own: its weights, and its last evaluation loss."""
    torch.manual_seed(trial.train.seed)
    inject(model, trial.lora, variant=trial.variant)
    records = train(model, EXAMPLES, trial.train, folder, 0, HELD_OUT, say=lambda line: None)
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    return adapter_state_dict(model), losses


def quiet(line):
    pass


def same_as_alone(trials, kind, folder, most=1e-5, **options):
    results = sweep(base(kind), EXAMPLES, trials, evaluation=HELD_OUT, say=quiet, **options)
    for number, (trial, result) in enumerate(zip(trials, results, strict=True)):
        weights, losses = alone(base(kind), trial, folder / str(number))
        assert not result.ended and result.weights.keys() == weights.keys()
        apart = max(float((result.weights[key] - weights[key]).abs().max()) for key in weights)
        assert apart <= most, (number, apart)
        assert list(result.evaluations.values()) == pytest.approx(losses, abs=most)
    return results


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_ranks_targets_rates_seeds_and_dropout_differ(kind, tmp_path):
    trials = [
        Trial(lora(), plan()),
        Trial(lora(r=7, lora_dropout=0.2), plan(seed=3, lr=1e-3, batch_size=2)),
        Trial(
            lora(r=1, target_modules=["q_proj", "down_proj"]), plan(accumulate=3, schedule="wsd", loraplus_lr_ratio=4)
        ),
        Trial(lora(target_modules=["gate_proj"], use_rslora=True), plan(optimizer="adamw8", steps=31, eval_every=10)),
    ]
    results = same_as_alone(trials, kind, tmp_path)
    assert [result.alone for result in results] == [""] * 4


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("name", ["dora", "pissa", "olora", "vera", "lora_fa", "orthogonal", "mica"])
def test_variants_share_a_pass(name, kind, tmp_path):
    trials = [
        Trial(lora(lora_dropout=0.1 if name == "dora" else 0.0), plan(steps=20, lr=1e-3), name),
        Trial(lora(), plan(steps=20)),
    ]
    results = same_as_alone(trials, kind, tmp_path, most=2e-5)
    assert [result.alone for result in results] == ["", ""]


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        (
            Trial(lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()), plan(steps=9)),
            "lora_ga looks at the data",
        ),
        (Trial(lora(bias="lora_only"), plan(steps=9)), "more than updates of linear layers"),
        (
            Trial(lora(target_modules=["q_proj", "embed_tokens"]), plan(steps=9)),
            "embed_tokens is no update of a linear layer",
        ),
        (Trial(lora(target_modules=["v_proj", "lm_head"]), plan(steps=9)), "lm_head is the output head"),
    ],
)
def test_what_cannot_share_runs_by_itself(trial, why, tmp_path):
    first, second = sweep(base(), EXAMPLES, [trial, Trial(lora(), plan(steps=9))], evaluation=HELD_OUT, say=quiet)
    assert why in first.alone and not second.alone and not first.ended
    if trial.lora.init_lora_weights is True:
        weights, losses = alone(base(), trial, tmp_path)
        assert all(torch.allclose(first.weights[key], weights[key], atol=1e-6) for key in weights)
        assert list(first.evaluations.values()) == pytest.approx(losses, abs=1e-6)


def test_loftq_packs_a_copy(tmp_path):
    """Each trial packs a base of its own, to its own bits; the model stays dense, and those that share it do not notice."""
    trials = [
        Trial(lora(init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 3}), plan(steps=9))
        for bits in (2, 4)
    ]
    model = base()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    results = sweep(model, EXAMPLES, [*trials, Trial(lora(), plan(steps=9))], evaluation=HELD_OUT, say=quiet)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert ["packs a base of its own" in result.alone for result in results] == [True, True, False]
    assert results[0].evaluations[0] != results[1].evaluations[0]
    same_as_alone([*trials, Trial(lora(), plan(steps=9))], "dense", tmp_path)
    refused, _ = sweep(base("packed"), EXAMPLES, [trials[0], Trial(lora(), plan(steps=2))], say=quiet)
    assert "is packed already" in refused.ended


def test_full_fine_tuning_in_the_same_loop():
    model = base(bias=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (full,) = sweep(model, EXAMPLES, [Trial(None, plan(steps=12, lr=1e-3))], evaluation=HELD_OUT, say=quiet)
    losses = list(full.evaluations.values())
    assert full.parameters == sum(parameter.numel() for parameter in model.parameters()) and losses[-1] < losses[0]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    (packed,) = sweep(base("packed"), EXAMPLES, [Trial(None, plan())], say=quiet)
    assert "is packed, and full fine-tuning changes every weight" in packed.ended


def test_packed_examples_of_a_row(tmp_path):
    same_as_alone(
        [Trial(lora(), plan(pack="on", steps=20)), Trial(lora(r=2), plan(steps=20, seed=1))], "dense", tmp_path
    )


def test_activations_computed_again(tmp_path):
    fields = {"steps": 20, "gradient_checkpointing": True}
    trials = [Trial(lora(lora_dropout=0.3), plan(**fields)), Trial(lora(r=2), plan(seed=1, **fields))]
    same_as_alone(trials, "dense", tmp_path)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}, {}], ids=["dora", "bias", "plain"])
def test_masks_of_dropout_are_those_of_a_run_of_its_own(again, fields, tmp_path):
    """Whichever way a layer computes a trial, and also where one trial alone asks that activations are computed again."""
    trials = [
        Trial(lora(lora_dropout=0.3, **fields), plan(steps=12, lr=2e-3)),
        Trial(lora(r=2, lora_dropout=0.1), plan(steps=12, seed=1, gradient_checkpointing=again)),
    ]
    results = same_as_alone(trials, "dense", tmp_path)
    assert [result.alone for result in results] == ["", ""]


@pytest.mark.parametrize("together", [True, False])
def test_the_optimizer_of_lora_fa_freezes_and_corrects(together, tmp_path):
    trials = [
        Trial(lora(lora_dropout=0.2), plan(steps=12, optimizer="lora_fa")),
        Trial(lora(r=2), plan(steps=12, seed=1)),
        Trial(lora(r=3), plan(steps=12, seed=2, optimizer="lora_fa", clip=0.0)),
    ]
    results = same_as_alone(trials, "dense", tmp_path, together=together)
    model = base()
    torch.manual_seed(0)
    fresh = adapter_state_dict(inject(model, trials[0].lora))
    assert all(torch.equal(results[0].weights[key], fresh[key]) for key in fresh if "lora_A" in key)
    assert results[0].parameters == sum(value.numel() for key, value in fresh.items() if "lora_B" in key)


def test_a_frozen_a_with_dropout_shares_a_pass(tmp_path):
    trials = [Trial(lora(lora_dropout=0.2), plan(steps=8), "lora_fa"), Trial(lora(r=2), plan(steps=8))]
    assert [result.alone for result in same_as_alone(trials, "dense", tmp_path)] == ["", ""]


def test_a_name_and_a_config_that_contradict_each_other_are_refused():
    for name, fields in (
        ("lora", {"use_dora": True}),
        ("vera", {"use_dora": True}),
        ("dora", {"init_lora_weights": "pissa"}),
    ):
        with pytest.raises(ConfigError, match=f"variant='{name}', and .* means .*; leave one of the two out"):
            Trial(lora(**fields), plan(), name)


def test_a_variant_by_name_says_so_in_its_config(tmp_path):
    sweep(
        base(),
        EXAMPLES,
        [Trial(lora(), plan(steps=1), name, name) for name in ("dora", "pissa")],
        folder=tmp_path / "out",
        say=quiet,
    )
    configs = [json.loads((tmp_path / "out" / name / "adapter_config.json").read_text()) for name in ("dora", "pissa")]
    assert configs[0]["use_dora"] and configs[1]["init_lora_weights"] == "pissa"


@pytest.mark.parametrize("before", [False, True])
def test_activations_are_kept_again_after_a_sweep(before):
    model = base()
    if before:
        checkpoint_activations(model)
    sweep(model, EXAMPLES, [Trial(lora(), plan(steps=2, gradient_checkpointing=True))], say=quiet)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) is before


def test_a_model_that_drops_by_itself_runs_its_trials_one_after_another():
    model, said = models.gpt2(0, resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.0), []
    results = sweep(model, EXAMPLES, [Trial(lora(), plan(steps=2)), Trial(lora(r=2), plan(steps=2))], say=said.append)
    assert all("the model itself drops while it trains" in result.alone for result in results)
    assert "2 of 2 trials run one after another" in said[0]


def test_one_that_diverges_costs_the_others_nothing():
    good = [Trial(lora(), plan(steps=12)), Trial(lora(r=2), plan(steps=12, seed=4))]
    wild = Trial(lora(init_lora_weights=False, lora_alpha=10**30), plan(steps=12, lr=0.9))
    with_it = sweep(base(), EXAMPLES, [good[0], wild, good[1]], evaluation=HELD_OUT, say=quiet)
    without = sweep(base(), EXAMPLES, good, evaluation=HELD_OUT, say=quiet)
    assert with_it[1].ended and with_it[1].eval_loss is None
    for one, other in zip((with_it[0], with_it[2]), without, strict=True):
        assert not one.ended
        assert all(torch.allclose(one.weights[key], other.weights[key], atol=1e-6) for key in one.weights)


def test_the_model_is_as_it_was():
    model = base()
    model.train()
    model.lm_head.weight.requires_grad_(True)
    random = torch.get_rng_state()
    modules = dict(model.named_modules())
    sweep(model, EXAMPLES, [Trial(lora(), plan(steps=2))], say=quiet)
    assert torch.equal(torch.get_rng_state(), random) and model.training and model.lm_head.weight.requires_grad
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("together", [True, False])
def test_resumed_to_the_same_bits(together, tmp_path):
    trials = [
        Trial(lora(lora_dropout=0.1), plan(steps=14, eval_every=5)),
        Trial(lora(r=2), plan(steps=9, seed=2, optimizer="adamw8")),
        Trial(lora(bias="all"), plan(steps=6)),
    ]
    options = {"evaluation": HELD_OUT, "say": quiet, "together": together}
    whole = sweep(base(), EXAMPLES, trials, folder=tmp_path / "whole", **options)
    steps = []

    def stop(name, record):
        steps.append(record["step"])
        if len(steps) == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(base(), EXAMPLES, trials, folder=tmp_path / "cut", save_every=2, watch=stop, **options)
    again = sweep(base(), EXAMPLES, trials, folder=tmp_path / "cut", resume=True, **options)
    for one, other in zip(whole, again, strict=True):
        assert one.weights.keys() == other.weights.keys()
        assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)
        assert one.records == other.records
    finished = sweep(base(), EXAMPLES, trials, folder=tmp_path / "cut", resume=True, **options)
    assert all(
        torch.equal(one.weights[key], other.weights[key])
        for one, other in zip(whole, finished, strict=True)
        for key in one.weights
    )


def test_ctrl_c_keeps_what_is_done(tmp_path):
    def stop(name, record):
        if (name, record["step"]) == ("t1", 4):
            os.kill(os.getpid(), signal.SIGINT)

    trials = [Trial(lora(), plan(steps=8)), Trial(lora(r=2), plan(steps=8))]
    with pytest.raises(Interrupted, match=r"Ctrl-C after step 4 of the sweep: saved in .*; go on with --resume"):
        sweep(base(), EXAMPLES, trials, folder=tmp_path / "s", watch=stop, say=quiet)
    assert (tmp_path / "s" / "runs.csv").read_text().count("\n") == 3
    results = sweep(base(), EXAMPLES, trials, folder=tmp_path / "s", resume=True, say=quiet)
    assert [len(result.losses) for result in results] == [8, 8]


def test_the_folder(tmp_path):
    trials = trials_of("r=2,4 lr=1e-3,5e-3", lora=lora(), train=plan(steps=3))

    def measure(model, result):
        return {"norm": sum(float(p.detach().norm()) for p in model.parameters() if p.requires_grad)}

    results = sweep(base(), EXAMPLES, trials, evaluation=HELD_OUT, folder=tmp_path / "s", measure=measure, say=quiet)
    table = list(csv.DictReader((tmp_path / "s" / "runs.csv").read_text().splitlines()))
    assert [row["run"] for row in table] == ["t1", "t2", "t3", "t4"] and [row["r"] for row in table] == [
        "2",
        "2",
        "4",
        "4",
    ]
    assert all(float(row["eval_loss"]) == result.eval_loss for row, result in zip(table, results, strict=True))
    assert all(float(row["norm"]) > 0 and row["together"] == "yes" and row["steps"] == "3" for row in table)
    model = base()
    load_adapter(model, tmp_path / "s" / "t3")
    own = adapter_state_dict(model)
    assert all(torch.equal(own[key], results[2].weights[key]) for key in own)
    lines = [json.loads(line) for line in (tmp_path / "s" / "log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["run"] == "t2"]) == 3 + 2
    with pytest.raises(Exception, match="holds a sweep already"):
        sweep(base(), EXAMPLES, trials, folder=tmp_path / "s", say=quiet)
    with pytest.raises(Exception, match="a sweep of other trials lies there"):
        sweep(base(), EXAMPLES, trials[:2], evaluation=HELD_OUT, folder=tmp_path / "s", resume=True, say=quiet)
    sweep(base(), EXAMPLES, trials[:1], folder=tmp_path / "s", overwrite=True, say=quiet)
    assert not (tmp_path / "s" / "t4" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("lr=1e-3 rr=4", "'rr' is no setting; the closest are"),
        ("lr", "'lr' has no value; wanted name=value,value"),
        ("lr=0", "lr=0"),
        ("r=4 r=8", "r stands there twice"),
        ("variant=dorra", "variant='dorra' is not registered; known are full, "),
        ("r=two", "r='two'"),
        ("compile=true", "compile=True: no setting of one run in a sweep"),
        ("seed=" + ",".join(map(str, range(1001))), "has 1001 trials; wanted 1000 at most"),
    ],
)
def test_bad_grids(grid, said):
    with pytest.raises(ConfigError) as caught:
        trials_of(grid)
    assert said in str(caught.value)


def test_grids():
    trials = trials_of("variant=lora,full lr=1e-3,2e-3 target_modules=q_proj+v_proj,all-linear", seeds=2, train=plan())
    assert len(trials) == 12 and sum(trial.lora is None for trial in trials) == 4  # full has no targets
    assert {tuple(t.lora.target_modules) for t in trials if t.lora and t.lora.target_modules != "all-linear"} == {
        ("q_proj", "v_proj")
    }
    assert {trial.train.seed for trial in trials} == {0, 1}


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no trial"):
        sweep(base(), EXAMPLES, [])
    with pytest.raises(ConfigError, match="two trials are called 'a'"):
        sweep(base(), EXAMPLES, [Trial(lora(), plan(), name="a"), Trial(lora(r=2), plan(), name="a")])
    with pytest.raises(StateError, match="the model has adapters already"):
        sweep(inject(base(), lora()), EXAMPLES, [Trial(lora(), plan())])
    with pytest.raises(ConfigError, match="no_such_layer"):
        sweep(base(), EXAMPLES, [Trial(lora(target_modules=["no_such_layer"]), plan())], say=quiet)
    one, other = sweep(
        base(), EXAMPLES, [Trial(lora(target_modules=["no_such"]), plan()), Trial(lora(), plan(steps=1))], say=quiet
    )
    assert "no_such" in one.ended and not other.ended
    assert dataclasses.is_dataclass(one)


def test_a_last_loss_that_is_not_finite_is_none():
    trial = Trial(lora(), plan())
    records = [{"step": 0, "eval_loss": 2.0}, {"step": STEPS, "eval_loss": None}]
    assert Result(trial, "t1", records=records).eval_loss is None
    records.insert(1, {"step": 5, "eval_loss": 1.5})
    assert Result(Trial(lora(), plan(keep_best=True, eval_every=5)), "t2", records=records).eval_loss == 1.5
