"""Early stopping and the best adapter: what is decided, from which evaluations, and that a run that is gone on with decides alike."""

import json
import shutil

import pytest
import torch

import minilora.training.loop as loop
from minilora.errors import CheckpointError, ConfigError, OutOfMemory
from minilora.training.best import Best
from minilora.training.settings import TrainConfig
from tests.training.test_resume import EXAMPLES, files_of, fresh, run

EVALUATION = EXAMPLES[:2]
# At this rate the loss of what is held out goes up and down.
WILD = {"lr": 0.05, "steps": 12, "eval_every": 2, "evaluation": EVALUATION, "data": EXAMPLES[2:], "clip": 0.0}


def best_of(losses, **fields):
    best = Best(TrainConfig(eval_every=1, **fields))
    for step, loss in enumerate(losses, 1):
        best.note(step, loss, step)
    return best


@pytest.mark.parametrize(
    ("losses", "min_delta", "without_gain"),
    [
        ([], 0.0, 0),
        ([3.0], 0.0, 0),
        ([3.0, 2.0, 2.0], 0.0, 1),
        ([3.0, 2.0, 2.5, 2.1, 1.9], 0.0, 0),
        ([3.0, 2.9, 2.8, 2.7], 0.25, 0),  # less than the best before them by more than that, together
        ([3.0, 2.9, 2.8], 0.25, 2),
        ([3.0, None, None], 0.0, 2),
        ([None, 5.0], 0.0, 0),
    ],
)
def test_evaluations_without_gain_are_counted(losses, min_delta, without_gain):
    best = best_of(losses, min_delta=min_delta, patience=2)
    assert best.without_gain == without_gain and best.over == (without_gain >= 2)
    assert not best_of(losses).over


def test_the_lowest_is_the_first_of_equals_and_finite():
    assert best_of([3.0, 2.0, 2.0, None]).lowest.step == 2
    assert best_of([None]).lowest is None and best_of([]).lowest is None
    assert best_of([3.0, 2.0], keep_best=True).spare == 2 and best_of([3.0, 2.0]).spare == 0
    assert best_of([3.0, 2.0]).up_to(1) is None and len(best_of([3.0, 2.0], patience=1).up_to(1)) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patience": 3}, "patience: looks at the evaluations in between; set eval_every"),
        ({"keep_best": True}, "keep_best: looks at the evaluations"),
        ({"min_delta": 0.1, "eval_every": 3}, "min_delta=0.1: belongs to patience"),
        ({"patience": -1}, "patience=-1"),
        ({"keep_best": 1}, "keep_best=1"),
    ],
)
def test_what_would_do_nothing_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**fields)


@pytest.mark.parametrize("name", ["patience", "keep_best"])
def test_without_data_to_evaluate_on_it_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: there is no data to evaluate on"):
        run(fresh(), tmp_path / "run", **{name: True if name == "keep_best" else 2}, eval_every=1)
    assert not (tmp_path / "run").exists()


# ---- whole runs


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with every checkpoint that neither stops nor keeps: ``(folder, {step: evaluation loss})``."""
    folder = tmp_path_factory.mktemp("plain")
    records = run(fresh(), folder, save_every=1, keep_checkpoints=99, **WILD)
    found = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r and r["step"]}
    assert min(found, key=found.get) not in (2, 12)  # else nothing is shown here
    return folder, found


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_adapter_is_that_of_the_lowest_loss_and_its_checkpoint_stays(plain, tmp_path):
    folder, losses = plain
    best, said, model = min(losses, key=losses.get), [], fresh()
    run(model, tmp_path, say=said, keep_best=True, keep_checkpoints=1, save_every=1, **WILD)
    assert weights(tmp_path) == weights(folder / f"checkpoint-{best}") != weights(folder)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-12"}
    assert said[-1] == f"the adapter is that of step {best}, of the lowest evaluation loss: {losses[best]:.4f}"
    with torch.no_grad():
        assert loop.evaluate(model, EVALUATION, 2, 40) == losses[best]  # the model that a caller goes on with


def stops_at(losses, patience):
    lowest, count = float("inf"), 0
    for step, loss in losses.items():
        lowest, count = (loss, 0) if loss < lowest else (lowest, count + 1)
        if count == patience:
            return step
    raise AssertionError("it does not stop")


def test_a_run_stops_after_so_many_evaluations_without_gain(plain, tmp_path):
    folder, losses = plain
    last, said = stops_at(losses, 2), []
    assert last < 12
    records = run(fresh(), tmp_path, say=said, patience=2, **WILD)
    assert records[-1]["step"] == last and weights(tmp_path) == weights(folder / f"checkpoint-{last}")
    assert f"stopped after step {last} of 12: 2 evaluations without a lower loss" in said


@pytest.mark.parametrize("fields", [{"keep_best": True}, {"patience": 2}, {"keep_best": True, "patience": 2}], ids=str)
def test_from_every_step_it_goes_on_to_the_same_end(tmp_path, fields):
    whole = tmp_path / "whole"
    records = run(fresh(), whole, save_every=1, keep_checkpoints=99, **fields, **WILD)
    for step in sorted(int(path.name.partition("-")[2]) for path in whole.glob("checkpoint-*")):
        place = tmp_path / str(step)
        for path in whole.glob("checkpoint-*"):
            if int(path.name.partition("-")[2]) <= step:
                shutil.copytree(path, place / path.name)
        again = run(fresh(seed=8), place, resume=True, **fields, **WILD)  # without a log
        assert files_of(place) == files_of(whole), step
        assert step == records[-1]["step"] or again[-1]["step"] == records[-1]["step"]


def test_a_run_that_does_not_ask_keeps_nothing_of_it(plain):
    state = json.loads((plain[0] / "checkpoint-12" / "training.json").read_text())
    assert (
        set(state) == {"version", "step", "meaning", "files", "sha256"}
        and "eval_every" not in state["meaning"]["training"]
    )


def test_the_best_that_is_gone_is_told_at_once_on_resume_and_at_the_end(plain, tmp_path):
    best = min(plain[1], key=plain[1].get)
    run(fresh(), tmp_path, keep_best=True, save_every=1, keep_checkpoints=1, **WILD)
    (tmp_path / f"checkpoint-{best}" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"checkpoint-{best}.*it holds the lowest evaluation loss \(keep_best\)"):
        run(fresh(), tmp_path, keep_best=True, save_every=1, keep_checkpoints=1, resume=True, **WILD)

    def lose(record):
        if record["step"] == 12:
            shutil.rmtree(tmp_path / "other" / f"checkpoint-{best}", ignore_errors=True)

    with pytest.raises(CheckpointError, match=r"restore it.*the last state: saved in .*checkpoint-12"):
        run(fresh(), tmp_path / "other", keep_best=True, watch=lose, **WILD)
    assert (tmp_path / "other" / "checkpoint-12").is_dir()


@pytest.mark.parametrize("fields", [{}, {"keep_best": True}], ids=str)
def test_an_evaluation_that_had_no_memory_comes_again(plain, tmp_path, monkeypatch, fields):
    """The step before it is saved without it; what goes on from there must not know less."""
    real, calls = loop.evaluate, []

    def evaluate(*given, **more):
        calls.append(1)
        if len(calls) == 3:  # after step 4
            raise MemoryError("no memory")
        return real(*given, **more)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(OutOfMemory):
        run(fresh(), tmp_path, **fields, **WILD)
    records = run(fresh(seed=8), tmp_path, resume=True, **fields, **WILD)
    assert {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r and r["step"]} == plain[1]
    best = min(plain[1], key=plain[1].get)
    assert weights(tmp_path) == weights(plain[0] / f"checkpoint-{best if fields else 12}")


@pytest.mark.parametrize(
    "wrong",
    [
        [[2, 1.0]],
        [[2, "1", 2]],
        [[9, 1.0, 9]],
        [[2, 1.0, 2], [2, 1.0, 2]],
        [[2, 1.0, 3]],
        [[2, float("inf"), 2]],
        {"a": 1},
        3,
    ],
)
def test_evaluations_that_no_run_leaves_are_damage(tmp_path, wrong):
    from minilora.training.checkpoint import _state_bytes, parse_checkpoint, read_checkpoint_files

    run(fresh(), tmp_path, keep_best=True, save_every=4, keep_checkpoints=9, **WILD)
    place = tmp_path / "checkpoint-4"
    content = json.loads((place / "training.json").read_text())
    assert parse_checkpoint(read_checkpoint_files(place), place, 4).evaluations
    (place / "training.json").write_bytes(_state_bytes(content | {"evaluations": wrong}))
    with pytest.raises(CheckpointError, match=r"training\.json: damaged"):
        parse_checkpoint(read_checkpoint_files(place), place, 4)
