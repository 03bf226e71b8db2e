"""Intervals over seeds are Student's, groups are of equal settings, and the closing words say no more than the seeds do."""

import math
import random

import pytest

from minilora.errors import CheckpointError, ConfigError
from minilora.lab.verdicts.groups import families_of, read_table
from minilora.lab.verdicts.verdict import closing, interval, t_quantile, told_apart, verdict

HEAD = "run,variant,r,lora_alpha,target_modules,lr,seed,steps,done,loss,eval_loss,forgetting,parameters,seconds,together,ended"
DIVERGED = "step 4: the loss is nan in micro-batch 1; 3 steps in a row (max_skipped)"


def row(r=4, lr=0.01, seed=0, loss=2.0, ended="", **fields):
    values = {"variant": "lora", "forgetting": "", "together": "yes", "train": 1.5} | fields
    return (
        f"t{r}-{lr}-{seed},{values['variant']},{r},10,all-linear,{lr},{seed},9,9,{values['train']},"
        f"{'' if loss is None else loss},{values['forgetting']},{50 * r if r else 7},0.5,{values['together']},{ended}"
    )


def table(*rows):
    return read_table("\n".join([HEAD, *rows]) + "\n")


def seeds(losses, **fields):
    """A row a seed; None is one that diverged."""
    return [
        row(seed=seed, loss=loss, ended=DIVERGED if loss is None else "", **fields) for seed, loss in enumerate(losses)
    ]


# ---- statistics


@pytest.mark.parametrize("freedom", [1, 1.37, 2, 3, 4.9, 9, 29, 99, 101, 1e3, 1e5])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_quantile_is_that_of_scipy(freedom, level):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, freedom), rel=2e-7)


@pytest.mark.parametrize(("freedom", "level"), [(0.5, 0.95), (math.inf, 0.95), (math.nan, 0.95), (3, 0), (3, 1)])
def test_no_quantile(freedom, level):
    with pytest.raises(ConfigError, match="wanted freedom >= 1"):
        t_quantile(freedom, level)


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.spread, found.count) == (2.0, 1.0, 3)
    assert found.half == pytest.approx(4.302652729911275 / math.sqrt(3))  # Student's t of 2 degrees of freedom
    assert found.low + found.high == pytest.approx(4.0) and found.holds(4.4) and not found.holds(4.5)
    assert interval([1.0, 2.0, 3.0], level=0.5).half == pytest.approx(0.816496580927726 / math.sqrt(3))


def test_of_one_value_nothing_is_known():
    found = interval([1.5])
    assert (found.mean, found.low, found.high, found.count) == (1.5, -math.inf, math.inf, 1) and math.isnan(
        found.spread
    )


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_have_no_interval(values):
    with pytest.raises(ConfigError, match="wanted one or more, and finite ones"):
        interval(values)
    with pytest.raises(ConfigError, match="wanted one or more, and finite ones"):
        told_apart({0: 1.0}, dict(enumerate(values)))


def test_of_100_intervals_95_hold_the_mean():
    draws = random.Random(0)
    held = sum(interval([draws.gauss(3, 2) for _ in range(3)]).holds(3) for _ in range(4000))
    assert held / 4000 == pytest.approx(0.95, abs=0.01)


def test_equal_seeds_are_compared_with_each_other():
    stats = pytest.importorskip("scipy.stats")
    first, second = {0: 1.0, 1: 2.0, 2: 4.0, 9: 70.0}, {2: 4.3, 0: 1.2, 1: 2.3, 5: -8.0}
    found = told_apart(first, second)
    ends = stats.ttest_rel([1.2, 2.3, 4.3], [1.0, 2.0, 4.0]).confidence_interval()
    assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high)) and found.paired
    assert found.apart and found.interval.mean == pytest.approx(0.8 / 3) and found.interval.count == 3
    assert not told_apart(
        {0: 1.0, 1: 2.0, 2: 4.0}, {10: 1.2, 11: 2.3, 12: 4.3}
    ).apart  # what the pairs take out hides it
    assert not told_apart(first, first).apart and told_apart({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}).apart


def test_other_seeds_are_compared_by_their_means():
    stats = pytest.importorskip("scipy.stats")
    first, second = {0: 1.0, 1: 1.2, 2: 1.1, 3: 1.4}, {3: 2.0, 4: 2.9, 5: 2.2}
    found = told_apart(first, second)
    ends = stats.ttest_ind([*second.values()], [*first.values()], equal_var=False).confidence_interval()
    assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high))
    assert not found.paired and found.apart
    assert told_apart({0: 1.0, 1: 1.0}, {2: 1.0, 3: 1.0}).apart is False


@pytest.mark.parametrize(
    ("second", "mean", "paired"), [({1: 2.5}, 0.5, True), ({7: 2.5}, 1.0, False), ({1: 2.5, 8: 3.0}, None, False)]
)
def test_one_seed_tells_nothing_apart(second, mean, paired):
    found = told_apart({0: 1.0, 1: 2.0}, second)
    if mean is not None:
        assert found.interval.mean == mean and found.paired is paired and not found.apart
        assert found.interval.high == math.inf
    else:  # two on each side, of which one is shared: the means
        assert math.isfinite(found.interval.high) and found.paired is paired


# ---- groups


def test_groups_differ_in_the_seed_only():
    rows = [*seeds([2.0, 2.2], lr=0.01), *seeds([2.4, 2.6], lr=0.001), *seeds([1.0, None], r=7, lr=0.01)]
    small, large = families_of(table(*rows))
    assert (small.name, large.name) == ("r=4", "r=7") and [group.rate for group in small.groups] == [0.001, 0.01]
    assert small.best.losses == {0: 2.0, 1: 2.2} and small.best.interval.mean == pytest.approx(2.1)
    assert (large.best.tried, large.best.diverged, large.best.losses) == (2, 1, {0: 1.0})


def test_a_rate_at_which_a_seed_diverged_is_no_rival():
    (family,) = families_of(table(*seeds([1.0, None], lr=0.1), *seeds([2.0, 2.1], lr=0.01), *seeds([None], lr=0.5)))
    assert family.best.rate == 0.01 and family.edge == "lowest"
    (family,) = families_of(table(*seeds([1.0, None], lr=0.1), *seeds([2.0, None], lr=0.01)))
    assert family.best.rate == 0.1


def test_a_seed_that_ran_twice_counts_once():
    (family,) = families_of(table(row(loss=2.0), row(loss=2.0), row(seed=1, loss=2.5)))
    assert family.best.interval.count == 2 and family.best.interval.mean == 2.25


def test_names_say_what_differs():
    full = row(variant="full", r="")
    names = [family.name for family in families_of(table(row(), row(r=7), full, row(variant="dora")))]
    assert names == ["lora r=4", "lora r=7", "full", "dora r=4"]
    assert [family.name for family in families_of(table(row(), full))] == ["lora r=4", "full"]
    assert [family.name for family in families_of(table(row()))] == ["lora"]
    modules = [row().replace("all-linear", "q_proj v_proj"), row()]
    assert [family.name for family in families_of(table(*modules))] == [
        "target_modules=q_proj+v_proj",
        "target_modules=all-linear",
    ]


def test_what_was_measured_is_a_mean_over_seeds():
    (family,) = families_of(table(row(forgetting=0.2), row(seed=1, forgetting=0.4), row(seed=2, forgetting="nan")))
    assert family.best.measured("forgetting").mean == pytest.approx(0.3) and family.best.measured("other") is None


@pytest.mark.parametrize(
    ("loss", "ended", "fate"),
    [
        (2.0, "", ""),
        ("nan", "", "diverged"),
        ("", "", "diverged"),
        ("", DIVERGED, "diverged"),
        (2.0, "step 3: a weight became infinite at learning rate 0.9", "diverged"),
        ("", "the first step has no finite gradient: the loss is nan; look at the base", "diverged"),
        ("", "the first gradient is zero everywhere; so nothing would train", "refused"),
        (2.0, "has not ended", "goes"),
    ],
)
def test_what_became_of_a_trial(loss, ended, fate):
    trial, _ = table(row(loss=loss, ended=ended), row(seed=1)).trials
    assert trial.fate == fate and (trial.loss is None) is bool(fate)


def test_without_evaluations_the_training_loss_counts():
    found = table(row(loss=None, train=1.25), row(loss=None, train=1.75, seed=1))
    assert found.by == "loss" and families_of(found)[0].best.interval.mean == 1.5
    assert "Nothing was evaluated" in closing(found)[-1]
    assert table(*seeds([None, None])).by == "eval_loss"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column 'run'"),
        ("a,b\n1,2\n", "no column 'run'"),
        (HEAD, "no trial in it"),
        (f"{HEAD}\n1,2,3\n", "line 2: not 16 cells"),
        (f"{HEAD}\n{row()},5\n", "line 2: not 16 cells"),
        (f"{HEAD}\n{row()}\n{row(lr='fast')}\n", "line 3: lr='fast' is no number"),
        (f"{HEAD}\n{row(lr=0)}\n", "line 2: lr=0; wanted a finite rate above 0"),
        (f"{HEAD}\n{row(seed='x')}\n", "seed='x' is no number"),
        (f"{HEAD}\n{row(loss='low')}\n", "eval_loss='low' is no number"),
        (f"{HEAD}\n{row(forgetting='much')}\n", "forgetting='much' is no number"),
    ],
)
def test_tables_that_are_none(text, said):
    with pytest.raises(CheckpointError) as caught:
        read_table(text, "runs.csv")
    assert said in str(caught.value) and str(caught.value).startswith("runs.csv")


# ---- the words

AROUND = [*seeds([3.0, 3.1, 3.2], r=4, lr=0.001), *seeds([None] * 3, r=4, lr=0.1)]


def test_best_alike_and_worse():
    rows = [
        *AROUND,
        *seeds([2.00, 2.10, 2.21], r=4, lr=0.01),
        *seeds([2.01, 2.10, 2.22], r=8, lr=0.01),
        *seeds([2.50, 2.60, 2.70], r=1, lr=0.01),
    ]
    outcomes = table(*rows)
    found = verdict(families_of(outcomes))
    assert found.best.family == "r=4" and [rival.group.family for rival in found.alike] == ["r=8"]
    assert [rival.group.family for rival in found.worse] == ["r=1"] and not found.untold and not found.below
    assert closing(outcomes) == [
        "The best is r=4 at lr=0.01: evaluation loss 2.103 nats a token (95 % interval 1.842 to 2.364, 3 seeds).",
        "At these seeds r=8 at lr=0.01 (+0.0067, -0.0077 to 0.021) cannot be told from it.",
        "Worse by more than the seeds differ: r=1 at lr=0.01 (+0.50, 0.48 to 0.51).",
        "Diverged: r=4 at lr=0.1.",
        "One rate was tried of r=8 and r=1, so whether another is better is not known.",
    ]


def test_one_seed_cannot_tell():
    said = closing(table(row(loss=2.0), row(r=8, loss=2.5)))
    assert said == [
        "The best is r=4 at lr=0.01: evaluation loss 2.000 nats a token, of one seed.",
        "Whether others are worse cannot be told from one seed: r=8 at lr=0.01 (+0.50). Run three seeds or more.",
        "One rate was tried, so whether another is better is not known.",
    ]


def test_the_best_rate_at_an_edge():
    highest = [*seeds([2.0, 2.1], lr=0.1), *seeds([2.5, 2.6], lr=0.01)]
    lowest = [*seeds([2.9, 2.8], r=8, lr=0.1), *seeds([2.5, 2.6], r=8, lr=0.01)]
    said = closing(table(*highest, *lowest))
    assert said[-2:] == [
        "The best rate is the highest tried of r=4 (0.1): try higher ones.",
        "The best rate is the lowest tried of r=8 (0.01): try lower ones.",
    ]
    assert not any("try" in line for line in closing(table(*highest, *AROUND, *seeds([None], lr=0.5))))


def test_lower_only_because_other_seeds_diverged():
    rows = [*seeds([2.0, 2.1, 2.2], lr=0.01), *seeds([1.0, 1.1, None], r=8, lr=0.01)]
    found = verdict(families_of(table(*rows)))
    assert found.best.family == "r=4" and [rival.group.family for rival in found.below] == ["r=8"]
    said = closing(table(*rows))
    assert (
        "Lower where they came to their end, but with more seeds that diverged: r=8 at lr=0.01 (-1.0, -1.0 to -1.0)."
        in said
    )
    assert "Diverged: r=8 at lr=0.01 (1 of 3 seeds)." in said


def test_nothing_ended_and_what_was_refused():
    rows = [
        row(loss=None, ended=DIVERGED),
        row(r=8, loss=None, ended="no layer is called so"),
        row(r=9, ended="has not ended"),
    ]
    assert closing(table(*rows)) == [
        "No trial came to its end with a finite loss, so none is the best.",
        "Diverged: r=4 at lr=0.01.",
        "Did not run: t8-0.01-0 (no layer is called so).",
        "1 of 3 trials has not ended, so this may change.",
    ]


def test_many_are_counted_and_not_named():
    rows = [line for r in range(1, 13) for line in seeds([2 + r, 2.1 + r, 2.2 + r], r=r)]
    (worse,) = [line for line in closing(table(*rows)) if line.startswith("Worse")]
    assert worse.endswith("r=7 at lr=0.01 (+6.0, 6.0 to 6.0) and 5 more.")
    assert "Diverged: every family at lr=0.5." in closing(
        table(*rows, *[line for r in range(1, 13) for line in seeds([None], r=r, lr=0.5)])
    )
