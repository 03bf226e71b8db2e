"""A run of several sessions: its time, its answers and its memory are those of all of them, and a finished one goes on with more steps."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from minilora.errors import CheckpointError, Interrupted
from minilora.job.finetune import fine_tune
from minilora.job.record import RECORD_FILE, Session, read_record, write_record
from minilora.training.checkpoint import own_checkpoints
from minilora.training.loop import learning_rate


def quiet(line):
    """Say nothing."""


def stop_after(step):
    """What watches a run, and sends it Ctrl-C after a step."""

    def watch(record):
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


def sha256(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def interrupted(make_job, tmp_path):
    """A run of six steps, of which two are done."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        fine_tune(make_job(out, steps=6), quiet, stop_after(2))
    return out


def test_an_interrupted_session_is_closed(interrupted):
    record = read_record(interrupted)
    (session,) = record.sessions
    assert (session.start, session.stop) == (0, 2)
    assert session.seconds["train"] > 0 and session.peak_mb["load"] > 0
    assert [answer.keys() for answer in record.answers] == [{"prompt", "before"}] * 2


def test_time_is_of_all_sessions_and_memory_the_most(interrupted, make_job):
    record = read_record(interrupted)
    long = Session("2026-01-01T00:00:00", 0, 2, {"load": 100.0, "train": 641.0}, {"load": 1e6, "train": 7.0})
    write_record(interrupted, replace(record, sessions=(long,)))
    outcome = fine_tune(make_job(interrupted, steps=6, resume=True), quiet)
    assert 641 < outcome.seconds["train"] < 700 and 100 < outcome.seconds["load"] < 200
    assert outcome.peaks_mb["load"] == 1e6 and outcome.peaks_mb["train"] > 7 and outcome.peak_mb == 1e6
    assert [(session.start, session.stop) for session in read_record(interrupted).sessions] == [(0, 2), (2, 6)]
    page = (interrupted / "report.html").read_text()
    assert f"{sum(outcome.seconds.values()):.0f} s" in page


def test_no_prompt_is_lost_and_the_first_answers_stay(interrupted, make_job):
    record = read_record(interrupted)
    told = [dict(answer) for answer in record.answers]
    told[0]["before"] = "of the very first session"
    write_record(interrupted, replace(record, answers=tuple(told)))
    outcome = fine_tune(make_job(interrupted, steps=6, resume=True, prompts=("New?",)), quiet)
    assert [pair["prompt"] for pair in outcome.answers] == ["What?", "Who are you?", "New?"]
    assert outcome.answers[0]["before"] == "of the very first session" and all(
        "after" in pair for pair in outcome.answers
    )
    assert list(read_record(interrupted).answers) == outcome.answers


def test_a_new_prompt_is_asked_of_the_untrained_model(interrupted, make_job, tmp_path):
    whole = fine_tune(make_job(tmp_path / "whole", steps=1, prompts=("New?",)), quiet)
    outcome = fine_tune(make_job(interrupted, steps=6, resume=True, prompts=("New?",)), quiet)
    assert outcome.answers[2]["before"] == whole.answers[0]["before"] != outcome.answers[2]["after"]


def test_answers_of_another_length_are_asked_anew(interrupted, make_job):
    outcome = fine_tune(make_job(interrupted, steps=6, resume=True, max_new_tokens=3), quiet)
    assert all(len(pair["before"]) <= 3 for pair in outcome.answers)


def test_what_a_killed_session_took_is_in_its_log(interrupted, make_job):
    record = read_record(interrupted)
    open_one = Session("2026-01-01T00:00:00", 0, None, {"load": 3.0}, {}, 0.0)
    write_record(interrupted, replace(record, sessions=(open_one,)))
    lines = [json.loads(line) for line in (interrupted / "log.jsonl").read_text().splitlines()]
    lines.append({**lines[-1], "step": 3, "seconds": 500.0})  # of a step after the checkpoint
    (interrupted / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = fine_tune(make_job(interrupted, steps=6, resume=True), quiet)
    first = read_record(interrupted).sessions[0]
    assert (first.stop, first.seconds) == (3, {"load": 3.0, "train": 500.0}) and outcome.seconds["train"] > 500


def test_a_run_that_had_no_record_goes_on(interrupted, make_job):
    (interrupted / RECORD_FILE).unlink()
    outcome = fine_tune(make_job(interrupted, steps=6, resume=True), quiet)
    told = [(session.start, session.stop) for session in read_record(interrupted).sessions]
    assert told == [(0, 2), (2, 6)] and len(outcome.answers) == 2


def test_a_damaged_record_is_refused_before_anything_is_loaded(interrupted, make_job):
    (interrupted / RECORD_FILE).write_text("{}")
    said = []
    with pytest.raises(CheckpointError, match=r"job\.json"):
        fine_tune(make_job(interrupted, steps=6, resume=True), said.append)
    assert not said


def test_beginning_anew_forgets(interrupted, make_job):
    fine_tune(make_job(interrupted, steps=2, overwrite=True, prompts=("Else?",)), quiet)
    record = read_record(interrupted)
    assert len(record.sessions) == 1 and record.prompts == ["Else?"]


# ---- more steps


@pytest.fixture(scope="module")
def finished(make_job, tmp_path_factory):
    """A run of four steps that has ended."""
    out = tmp_path_factory.mktemp("finished") / "out"
    fine_tune(make_job(out, steps=4), quiet)
    return out


def copied(finished, target):
    return shutil.copytree(finished, target)


def test_a_run_keeps_the_checkpoint_of_its_end(finished):
    assert own_checkpoints(finished) == ["checkpoint-4"]


def test_more_steps_are_a_new_schedule_which_is_said(finished, make_job, tmp_path):
    out, said = copied(finished, tmp_path / "out"), []
    job = make_job(out, steps=7, resume=True)
    outcome = fine_tune(job, said.append)
    (line,) = [line for line in said if line.startswith("a new schedule")]
    assert line == (
        "a new schedule from step 4: the learning rate of steps 5 to 7 rises and falls as in a run of 3 steps"
    )
    steps = {record["step"]: record["lr"] for record in outcome.records if "loss" in record}
    as_three = make_job(out, steps=3).training
    assert [steps[step] for step in (5, 6, 7)] == [learning_rate(as_three, step) for step in range(3)]
    assert len(steps) == 7 and own_checkpoints(out) == ["checkpoint-7", "checkpoint-4"]
    assert [(session.start, session.stop) for session in read_record(out).sessions] == [(0, 4), (4, 7)]


def test_more_steps_twice_are_the_same_bits(finished, make_job, tmp_path):
    every = []
    for name in ("one", "two"):
        out = copied(finished, tmp_path / name)
        fine_tune(make_job(out, steps=7, resume=True), quiet)
        every.append(sha256(out))
    assert every[0] == every[1] != sha256(finished)


@pytest.mark.parametrize("save_every", [0, 5])
def test_and_also_with_an_interrupt_between(finished, make_job, tmp_path, save_every):
    """The checkpoint in the new schedule knows where that began."""
    whole, parts = copied(finished, tmp_path / "whole"), copied(finished, tmp_path / "parts")
    fine_tune(make_job(whole, steps=8, resume=True), quiet)
    training = {"save_every": save_every}
    with pytest.raises(Interrupted):
        fine_tune(make_job(parts, steps=8, resume=True, training=training), quiet, stop_after(6))
    fine_tune(make_job(parts, steps=8, resume=True, training=training), quiet)
    assert sha256(parts) == sha256(whole)


def test_a_third_schedule_follows_the_second(finished, make_job, tmp_path):
    out = copied(finished, tmp_path / "out")
    fine_tune(make_job(out, steps=6, resume=True), quiet)
    said = []
    outcome = fine_tune(make_job(out, steps=9, resume=True), said.append)
    assert any(line.startswith("a new schedule from step 6: the learning rate of steps 7 to 9") for line in said)
    assert len(outcome.losses) == 9
    state = json.loads((out / "checkpoint-9" / "training.json").read_text())
    assert state["meaning"]["training"]["ends of earlier schedules"] == [4, 6]


def test_an_unfinished_run_keeps_its_schedule(interrupted, make_job):
    before = sha256_of_all(interrupted)
    with pytest.raises(CheckpointError, match="another schedule: steps is 9, in the checkpoint 6"):
        fine_tune(make_job(interrupted, steps=9, resume=True), quiet)
    assert sha256_of_all(interrupted) == before


def test_nor_do_fewer_steps_make_a_run_shorter(finished, make_job, tmp_path):
    out = copied(finished, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another schedule: steps is 3, in the checkpoint 4"):
        fine_tune(make_job(out, steps=3, resume=True), quiet)


@pytest.mark.parametrize(
    "changed", [{"training": {"lr": 0.01}}, {"training": {"weight_decay": 0.1}}, {"training": {"batch_size": 1}}]
)
def test_more_steps_change_nothing_else(finished, make_job, tmp_path, changed):
    out = copied(finished, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another schedule"):
        fine_tune(make_job(out, steps=7, resume=True, **changed), quiet)


def test_a_run_that_kept_no_end_is_refused_by_name(finished, make_job, tmp_path):
    out = copied(finished, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(CheckpointError, match="holds an adapter and no checkpoint of its end"):
        fine_tune(make_job(out, steps=7, resume=True), quiet)


@pytest.mark.parametrize("ends", [[0], [9], [3, 3], [3, 2], [True], [2.0], "2", {"2": 1}, [-1]])
def test_ends_that_no_run_has_are_damage(finished, make_job, tmp_path, ends):
    """Whoever changes a checkpoint can hash it anew."""
    from minilora.training import checkpoint as files

    out = copied(finished, tmp_path / "out")
    path = out / "checkpoint-4" / "training.json"
    state = json.loads(path.read_text())
    state["meaning"]["training"]["ends of earlier schedules"] = ends
    path.write_bytes(files._state_bytes(state))
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        fine_tune(make_job(out, steps=4, resume=True), quiet)


def sha256_of_all(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
