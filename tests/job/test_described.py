"""The headline of a report: held-out loss beside training loss, time of all sessions, loading apart from training."""

from pathlib import Path

import pytest

import minilora
from minilora.job.described import _count, described
from minilora.job.outcome import Outcome
from minilora.job.settings import Job
from minilora.report.page import render
from tests.job.asked import LORA

TABLES = {"memory": [], "parameters": [{"name": "a", "total": 100, "trainable": 5, "bits": 32.0}], "formats": "nf4"}
STEPS = [{"step": step, "loss": 4.0 / step, "seconds": 1.0 * step} for step in (1, 2, 4)]
EVALS = [{"step": 0, "eval_loss": 3.5}, {"step": 4, "eval_loss": 1.25}]
SECONDS = {"load": 41.0, "train": 600.0, "answers after": 43.0}
PEAKS = {"load": 810.0, "inject": 800.0, "train": 1230.0, "answers after": 900.0}


@pytest.fixture
def told():
    """What the report draws of a run, and its headline by label."""
    pytest.importorskip("transformers")  # whose version is told
    job = Job("m", "d.jsonl", "runs/x", lora=LORA)

    def tell(records=(*STEPS, *EVALS), peaks=PEAKS, sessions=1):
        outcome = Outcome(list(records), [], SECONDS, peaks, Path("runs/x"), sessions)
        told = described(job, outcome, 1000, TABLES, {}, {})
        return told, {tile["label"]: tile["value"] for tile in told["headline"]}

    return tell


def test_held_out_loss_stands_beside_training_loss(told):
    _, headline = told()
    assert list(headline)[:2] == ["training loss", "held-out loss"]
    assert (headline["training loss"], headline["held-out loss"]) == ("4.00 → 1.00", "3.50 → 1.25")


@pytest.mark.parametrize(
    ("evals", "said"),
    [
        ([], "nothing held out"),
        ([{"step": 4, "eval_loss": 1.25}], "1.25"),
        ([{"step": 0, "eval_loss": None}, {"step": 4, "eval_loss": 1.25}], "not finite → 1.25"),
    ],
)
def test_a_loss_that_is_not_there_is_said(told, evals, said):
    assert told((*STEPS, *evals))[1]["held-out loss"] == said


def test_the_time_is_that_of_all_sessions(told):
    assert told()[1]["time"] == "684 s" and told(sessions=2)[1]["time"] == "684 s in 2 sessions"


def test_parameters_are_counted_in_three_digits(told):
    assert told()[1]["parameters trained"] == "5 of 100"
    counts = {
        999: "999",
        1_234: "1.23 K",
        999_700: "1 M",
        2_442_240: "2.44 M",
        136_957_248: "137 M",
        8_030_261_248: "8.03 B",
    }
    assert {number: _count(number) for number in counts} == counts


def test_loading_stands_apart_from_training(told):
    run, headline = told()
    assert headline["peak memory, loading"] == "0.81 GB" and headline["peak memory, training"] == "1.23 GB"
    rows = {row["name"]: row["bytes"] for row in run["memory"]}
    assert rows["peak of the process, loading"] == 810_000_000
    assert rows["peak of the process, training"] == 1_230_000_000


def test_a_system_that_tells_no_memory_has_no_row_of_it(told):
    run, headline = told(peaks={"load": 0.0, "train": 0.0})
    assert not [label for label in headline if "memory" in label]
    assert not [row for row in run["memory"] if "peak" in row["name"]]


def test_the_version_stands_in_it_twice(told):
    run, _ = told()
    assert run["versions"]["minilora"] == minilora.__version__ and "transformers" in run["versions"]
    assert f"minilora {minilora.__version__}" in run["subtitle"]
    assert f"minilora {minilora.__version__}" in render(run)
