"""How long a run is, and its learning rate: steps or epochs, warm-up and decay in steps or shares, four schedules."""

import math

import pytest
import torch

from minilora.errors import ConfigError
from minilora.training.schedule import learning_rate
from minilora.training.settings import SCHEDULE, SCHEDULES, SINCE, TrainConfig


def rates(**fields):
    config = TrainConfig(lr=0.02, **fields)
    return [learning_rate(config, step) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup", "decay"), [(40, 8, 10), (37, 0.2, 0.25), (7, 3, 2)])
def test_after_the_warm_up_the_rates_are_those_of_transformers(schedule, steps, warmup, decay):
    """It raises the rate from 0 in the first step, and ours from ``lr / warmup``: a step of rate 0 teaches nothing."""
    optimization = pytest.importorskip("transformers.optimization")
    rise, fall = (part if part >= 1 else round(part * steps) for part in (warmup, decay))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = {
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, rise, steps),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, rise, steps),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, rise),
        "wsd": lambda: optimization.get_wsd_schedule(optimizer, rise, fall, steps, decay_type="1-sqrt"),
    }[schedule]()
    more = {"decay": decay} if schedule == "wsd" else {}
    ours = rates(steps=steps, warmup=warmup, schedule=schedule, **more)
    assert ours[:rise] == pytest.approx([0.02 * (step + 1) / rise for step in range(rise)])
    for step in range(steps):
        if step >= rise:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_the_cosine_has_the_bits_that_it_had():
    for steps, warmup in ((60, 0.1), (7, 0.5), (99, 0.33)):
        rise = max(1, round(warmup * steps))
        expected = [
            0.02 * 0.5 * (1 + math.cos(math.pi * (s - rise) / max(1, steps - rise))) for s in range(rise, steps)
        ]
        assert rates(steps=steps, warmup=warmup)[rise:] == expected


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_rate_ends_above_its_least(schedule):
    found, plain = rates(steps=50, schedule=schedule, min_lr_ratio=0.1), rates(steps=50, schedule=schedule)
    assert 0.002 < found[-1] < 0.02 * 0.3 and min(found[5:]) == found[-1]
    assert found[30:] == pytest.approx([0.1 * 0.02 + 0.9 * rate for rate in plain[30:]])


def test_steps_and_shares():
    assert rates(steps=20, warmup=5) == rates(steps=20, warmup=0.25) == rates(steps=20, warmup=5.0)
    assert rates(steps=20, warmup=1)[0] == 0.02 and rates(steps=20, warmup=2)[0] == 0.01
    assert type(TrainConfig(warmup=6.0).warmup) is int and type(TrainConfig(warmup=0).warmup) is float
    wsd = rates(steps=20, warmup=2, schedule="wsd", decay=4)
    assert wsd[2:17] == [0.02] * 15 and wsd[17] < 0.02  # the fall begins in the step after the last stable one
    assert rates(steps=1, schedule="wsd") == [0.02]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 3, "epochs": 2}, "steps=3 and epochs=2.*give one"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": -1.0}, "epochs=-1.0"),
        ({"warmup": 1.5}, "warmup=1.5: wanted a share"),
        ({"warmup": 61}, "warmup=61: 61 steps, and the run has 60"),
        ({"warmup": 0.5, "decay": 0.6, "schedule": "wsd"}, "warmup=0.5 and decay=0.6: 66 steps, and the run has 60"),
        ({"decay": 0.3}, "decay=0.3: belongs to schedule='wsd'"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio=0.1: with schedule='constant'"),
        ({"schedule": "step"}, "schedule='step': wanted one of cosine"),
        ({"min_lr_ratio": 1.0}, "min_lr_ratio=1.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("epochs", "count", "steps"), [(1, 7, 2), (2, 8, 4), (0.1, 120, 3), (0.01, 7, 1), (3, 30, 23), (0.5, 4, 1)]
)
def test_epochs_are_whole_steps_that_cover_them(epochs, count, steps):
    config = TrainConfig(epochs=epochs, batch_size=2, accumulate=2).for_examples(count)
    assert (config.steps, config.epochs) == (steps, None)
    assert TrainConfig(steps=9).for_examples(count).steps == 9


def test_a_warm_up_that_is_longer_than_the_epochs_is_refused_when_they_are_known():
    with pytest.raises(ConfigError, match="warmup=20: 20 steps, and the run has 5"):
        TrainConfig(epochs=1, warmup=20).for_examples(20)


def test_what_a_checkpoint_may_lack_is_what_it_meant():
    assert set(SINCE) < set(SCHEDULE)
    for name, value in SINCE.items():
        assert getattr(TrainConfig(), name) == value
