"""The fair table: every variant has the same budget, a verdict from paired differences, and a cost measured by itself."""

import csv
import io

import pytest
import torch

from minilora import LoraConfig, LoRALinear
from minilora.errors import ConfigError, StateError
from minilora.lab import cost
from minilora.lab.variants import BETTER, KNOWN, NOT_TOLD, WORSE, against, as_csv, fair_table, families
from minilora.lora.adapter import VARIANTS, register
from minilora.lora.slots import has_adapters
from tests.lab.ground import PlantedGround, TinyGround

SPREAD = {0: -0.02, 1: 0.03, 2: -0.01}  # of the seeds, far more than what variants differ in


class Planted(PlantedGround, TinyGround):
    """Planted losses, and a tiny model whose steps are timed."""

    def __init__(self, loss):
        TinyGround.__init__(self)
        PlantedGround.__init__(self, loss)


@pytest.fixture
def mine():
    """A researcher's own variant."""

    @register("mine")
    class Mine(LoRALinear):
        """LoRA by another name."""

    yield Mine
    del VARIANTS["mine"]


def planted(trial):
    better = {"mine": -0.01, "lora_fa": 0.01}.get(trial.variant, 0.0)
    noise = 0.02 * (trial.train.seed - 1) if trial.variant == "mica" or trial.lora.use_dora else 0.0
    return 1.5 + better + noise + SPREAD[trial.train.seed] + (0.1 if trial.train.lr != 3e-3 else 0)


def test_the_verdict_is_of_paired_differences(mine):
    rows = fair_table(Planted(planted), ["mine", "lora_fa", "dora"])
    assert [row["variant"] for row in rows] == ["lora", "mine", "lora_fa", "dora"]
    assert [row["verdict"] for row in rows] == ["", BETTER, WORSE, NOT_TOLD]
    assert rows[1]["difference"].mean == pytest.approx(-0.01)
    # The losses by themselves overlap: only the differences of equal seeds tell them apart.
    assert rows[0]["loss"].low < rows[1]["loss"].mean < rows[0]["loss"].high
    assert {row["rates tried"] for row in rows} == {4} and {row["rate"] for row in rows} == {3e-3}


@pytest.mark.parametrize(("shift", "verdict"), [(-0.1, BETTER), (0.0, NOT_TOLD), (0.1, WORSE)])
def test_against(shift, verdict):
    lora = {seed: 1.5 + spread for seed, spread in SPREAD.items()}
    own = {seed: loss + shift + 0.001 * seed * (-1) ** seed for seed, loss in lora.items()}
    assert against(lora, own)[1] == verdict


def test_the_same_budget_for_every_variant(mine):
    ground = Planted(planted)
    fair_table(ground, ["mine", "lora_fa"], budget=3, seeds=(0, 1))
    tried = {}
    for trial in ground.asked:
        tried.setdefault(trial.variant, set()).add((trial.train.lr, trial.train.seed))
    assert tried["mine"] == tried["lora_fa"] == tried[None] and len(tried["mine"]) == 4


def test_every_known_variant_trains():
    ground = TinyGround(steps=1)
    for name, own in ground.tune(families(list(KNOWN)), (3e-3,), (0,)).items():
        (result,) = own.results[3e-3].values()
        assert result.eval_loss != own.before and result.measured["forgetting"] > 0, name


def test_the_whole_table():
    ground = TinyGround(steps=2)
    rows = fair_table(ground, ["lora_fa", "full"], budget=3, seeds=(0, 1))
    assert not has_adapters(ground.model) and not any(p.requires_grad for p in ground.model.parameters())
    lora, fa, full = rows
    for row in rows:
        assert row["seconds a step"].mean > 0 and row["loss"].count == row["forgetting"].count == 2
    assert fa["parameters"] < lora["parameters"] < full["parameters"]
    assert fa["peak bytes"] < lora["peak bytes"] < full["peak bytes"]


def test_as_csv(mine):
    rows = fair_table(Planted(planted), ["mine"], seeds=(0, 1))
    own = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["variant"] for row in own] == ["lora", "mine"] and own[0]["difference low"] == ""
    assert float(own[1]["difference"]) == pytest.approx(rows[1]["difference"].mean)
    assert float(own[1]["loss low"]) == rows[1]["loss"].low and own[1]["peak bytes"] == str(rows[1]["peak bytes"])
    assert as_csv([]).strip() == ""


def test_configs_have_names_of_their_own():
    made = families({"small": LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"]), "full": "full"})
    assert (made["small"]["r"], made["small"]["lora_alpha"]) == (3, 12) and made["full"] == {"variant": "full"}
    trial = TinyGround().trial(1e-3, 0, **made["small"])
    assert trial.lora == LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["dorra"], "variant 'dorra' is not registered"),
        (["dora", "dora"], "variant 'dora' stands there twice"),
        (["alora"], "variant 'alora' cannot be trained here"),
        ({"wide": LoraConfig(r=4, lora_alpha=9, target_modules=["nowhere"])}, "variant 'wide' cannot be trained here"),
    ],
)
def test_refused_before_any_training(names, words):
    ground = Planted(planted)
    with pytest.raises(ConfigError, match=words):
        fair_table(ground, names)
    assert not ground.asked


def test_one_seed_is_refused():
    with pytest.raises(ConfigError, match=r"seeds=\[0\]"):
        fair_table(Planted(planted), ["dora"], seeds=(0,))


def test_one_that_diverges_is_not_judged():
    rows = fair_table(
        Planted(lambda trial: None if trial.lora.use_dora and trial.train.seed else planted(trial)), ["dora"]
    )
    assert rows[1]["loss"] is None and rows[1]["verdict"] == NOT_TOLD
    assert rows[1]["note"].startswith("seed 1, rate 0.003: the loss is not finite")
    with pytest.raises(StateError, match="LoRA itself"):
        fair_table(Planted(lambda trial: None), ["dora"])


def test_costs_leave_the_model_and_the_generator_alone():
    ground = TinyGround()
    trials = {"lora": ground.trial(1e-3, 0, r=5), "full": ground.trial(1e-3, 0, variant="full")}
    before, state = {n: p.clone() for n, p in ground.model.named_parameters()}, torch.get_rng_state()
    found = cost.costs(ground.model, ground.lesson, trials, rounds=2)
    assert all(torch.equal(p, before[n]) for n, p in ground.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    whole = sum(p.numel() for p in ground.model.parameters())
    assert found["full"].parameters == whole and len(found["lora"].seconds) == 2
    # Full fine-tuning holds two moments and a gradient of every weight beside it.
    assert found["full"].memory >= 16 * whole > 4 * whole <= found["lora"].memory < found["full"].memory
