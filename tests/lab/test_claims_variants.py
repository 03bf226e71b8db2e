"""Claims on rates, layers, batches and variants: each verdict follows what its trials give, and each claim runs on a tiny model."""

import math

import pytest

from minilora.errors import ConfigError
from minilora.lab.claims import claim, forgets, full_rate
from minilora.lab.ground.claim import FAILS, HOLDS, UNDECIDED
from minilora.lab.ground.ground import LADDER, Ground, Tuned
from tests.lab.ground import BEFORE, PlantedGround, TinyGround

NAMES = ("rslora", "mlp", "full-rate", "batch", "forgets", "b-alone", "nine")


def bowl(trial, best, loss):
    """A loss over the rate that is ``loss`` at ``best``, and a little of the seed."""
    return loss + 0.01 * math.log(trial.train.lr / best) ** 2 + 0.001 * trial.train.seed


def noise(trial, size=0.05):
    """The seed's, which differs between what is compared."""
    return size * (trial.train.seed - 1) * (1 if trial.lora and trial.lora.r == 16 else -1)


def scaled(rslora_gain, effective=1.0):
    """Losses of the two scalings; the rate counts times ``effective`` with alpha/sqrt(r)."""

    def loss(trial):
        times, gain = (effective, rslora_gain) if trial.lora.use_rslora else (1.0, 0.0)
        return bowl(trial, 3e-3 / times, 1.5 - gain)

    return loss


def by_layers(mlp, attention, spread=0.0):
    def loss(trial):
        on_mlp = "up_proj" in trial.lora.target_modules
        return bowl(trial, 3e-3, mlp if on_mlp else attention) + (noise(trial, spread) if on_mlp else 0)

    return loss


def rates(ratio):
    return lambda trial: bowl(trial, 1e-3 * (1 if trial.lora is None else ratio), 1.5)


def batches(cost_of_lora, cost_of_full):
    def loss(trial):
        cost = (cost_of_full if trial.lora is None else cost_of_lora) if trial.train.batch_size > 8 else 0
        return bowl(trial, 3e-3, 1.5 + cost)

    return loss


def frozen_a(of_same_rank, of_twice):
    def loss(trial):
        alone = {16: of_same_rank, 32: of_twice}[trial.lora.r] if trial.variant == "lora_fa" else 0
        return bowl(trial, 3e-3, 1.5 + alone)

    return loss


def one_of_nine(away):
    return lambda trial: bowl(trial, 3e-3, 1.5 * (1 + away * (trial.variant == "vera")))


PLANTED = [
    ("rslora", scaled(0.0, 8.0), HOLDS),
    ("rslora", scaled(0.05, 8.0), FAILS),
    ("rslora", scaled(0.0, 1.0), UNDECIDED),  # no difference to explain
    ("mlp", by_layers(1.4, 1.5), HOLDS),
    ("mlp", by_layers(1.5, 1.4), FAILS),
    ("mlp", by_layers(1.4, 1.41, spread=0.1), UNDECIDED),
    ("full-rate", rates(10), HOLDS),
    ("full-rate", rates(3), FAILS),
    ("full-rate", rates(100), UNDECIDED),  # beyond the grid
    ("batch", batches(0.2, 0.1), HOLDS),
    ("batch", batches(0.1, 0.2), FAILS),
    ("b-alone", frozen_a(0.01, 0.0), HOLDS),
    ("b-alone", frozen_a(0.1, 0.0), FAILS),
    ("nine", one_of_nine(0.01), HOLDS),
    ("nine", one_of_nine(0.05), FAILS),
    ("nine", one_of_nine(-0.05), FAILS),
]


@pytest.mark.parametrize(("name", "loss", "verdict"), PLANTED)
def test_verdict(name, loss, verdict):
    assert claim(name).run(PlantedGround(loss)).verdict == verdict


@pytest.mark.parametrize(("times", "verdict"), [(0.5, HOLDS), (2.0, FAILS)])
def test_forgetting_at_equal_loss(times, verdict):
    """Both learn along other rates; LoRA forgets ``times`` what full fine-tuning does at the same loss."""

    def loss(trial):
        return bowl(trial, 1e-3 if trial.lora is None else 1e-2, 1.5 if trial.lora is None else 1.52)

    def forgetting(trial):
        return (1 if trial.lora is None else times) * (BEFORE - loss(trial)) ** 2

    found = claim("forgets").run(PlantedGround(loss, forgetting))
    assert found.verdict == verdict
    for row in found.rows:
        assert row["forgetting of LoRA"] / row["forgetting of full"] == pytest.approx(times, rel=1e-9)


def test_nothing_learnt_is_undecided():
    assert claim("forgets").run(PlantedGround(lambda trial: BEFORE + 1)).verdict == UNDECIDED


def test_the_path_ends_at_the_best_rate():
    ground = PlantedGround(lambda trial: bowl(trial, 1e-3, 1.5))
    tuned = ground.tune({"one": {}}, (3e-4, 1e-3, 3e-3), (0,))["one"]
    assert [loss for loss, _ in forgets.path(tuned, 0)] == [BEFORE, tuned.losses_at(3e-4)[0], 1.5]
    assert math.isnan(forgets.forgetting_at([(2.0, 0.0), (1.5, 0.1)], 1.4))


def test_the_vertex_of_a_parabola():
    ground = PlantedGround(lambda trial: bowl(trial, 1.7e-3, 1.5))
    tuned = ground.tune({"one": {}}, (3e-4, 1e-3, 3e-3, 1e-2))["one"]
    assert full_rate.vertices(tuned) == pytest.approx(dict.fromkeys((0, 1, 2), 1.7e-3))
    at_the_end = Tuned("end", {rate: tuned.results[rate] for rate in (3e-3, 1e-2)})
    assert all(map(math.isnan, full_rate.vertices(at_the_end).values()))


@pytest.mark.parametrize("name", NAMES)
def test_on_a_tiny_model(name):
    found = claim(name).run(TinyGround())
    assert found.verdict in (HOLDS, FAILS, UNDECIDED)
    assert found.said and "nan" not in found.said


# ---- tuning alike


@pytest.mark.parametrize("best", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_grid_is_moved_and_not_grown(best, count):
    ground = PlantedGround(lambda trial: bowl(trial, best, 1.5))
    tuned = ground.tune_alike({"one": {}}, count)["one"]
    assert tuned.rate == best and len(tuned.results) == count
    assert min(tuned.results) < best < max(tuned.results)
    assert sorted(tuned.results[best]) == [0, 1, 2]
    assert all(list(by_seed) == [0] for rate, by_seed in tuned.results.items() if rate != best)


def test_the_ladder_ends():
    ground = PlantedGround(lambda trial: bowl(trial, 0.9, 1.5))
    tuned = ground.tune_alike({"one": {}})["one"]
    assert tuned.rate == LADDER[-1] and tuned.outwards == 1 and len(tuned.results) == 4


def test_a_grid_without_an_inside_is_refused():
    with pytest.raises(ConfigError, match="2 rates: wanted 3"):
        PlantedGround(lambda trial: 1.0).tune_alike({"one": {}}, 2)


def test_the_first_seed_chooses_the_rate():
    ground = PlantedGround(lambda trial: bowl(trial, 1e-2 if trial.train.seed else 1e-3, 1.5))
    assert ground.tune_alike({"one": {}})["one"].rate == 1e-3


def test_trials_are_shared():
    ground, said = TinyGround(), []
    ground.say = said.append
    ground.tune_alike({"one": {}}, 3)
    before = len(ground.done)
    ground.tune_alike({"other name": {}}, 3)
    assert len(ground.done) == before and isinstance(ground, Ground)
