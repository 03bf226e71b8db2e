"""``--report-to``: what each tracker is told, that a missing one is refused first, and that one that fails ends nothing."""

import importlib.util
import json
import sys

import pytest

from minilora.cli import main
from minilora.errors import ConfigError, MissingPackageError
from minilora.job import finetune
from minilora.job.settings import TRACKER_NAMES, Job
from minilora.job.trackers import TRACKERS, Trackers, refuse_missing

pytest.importorskip("transformers")
RECORDS = [
    {"step": 0, "eval_loss": 2.5, "prompt": "p", "answer": "a"},
    {"step": 1, "loss": 2.0, "lr": 0.1, "seconds": 1.0},
    {"step": 2, "skipped": "the loss is nan", "seconds": 2.0},
    {"step": 2, "eval_loss": None},
]
TOLD = [(0, {"eval/loss": 2.5}), (1, {"train/loss": 2.0, "train/lr": 0.1, "train/seconds": 1.0}), (2, {"train/skipped": 1.0})]  # fmt: skip


class Recorder:
    """A package that writes down how it is called."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            if name in self.fails:
                raise ConnectionError("no way to the server\nat all")
            return self

        return call

    def named(self, *names):
        return [(arguments, named) for name, arguments, named in self.calls if name in names]


def told(name, recorder):
    """``(step, numbers)`` of all that a package was told."""
    log = recorder.named({"wandb": "log", "trackio": "log", "mlflow": "log_metrics"}[name])
    return [(named["step"], arguments[0]) for arguments, named in log]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_each_is_begun_told_and_ended(monkeypatch, tmp_path, name):
    package, said = Recorder(), []
    monkeypatch.setitem(sys.modules, name, package)
    refuse_missing([name])
    trackers = Trackers([name], tmp_path / "mine", {"lr": 0.1, "targets": ["a"]}, said.append)
    assert package.calls == []
    for record in RECORDS:
        trackers.log(record)
    trackers.finish()
    assert told(name, package) == TOLD and said == []
    first, last = package.calls[0], package.calls[-1]
    assert first[0] == ("start_run" if name == "mlflow" else "init") and "mine" in first[2].values()
    assert last[0] == ("end_run" if name == "mlflow" else "finish")
    settings = package.named("log_params")[0][0][0] if name == "mlflow" else first[2]["config"]
    assert settings["lr"] in (0.1, "0.1")


@pytest.mark.parametrize("where", [("init",), ("log",), ("finish",)])
def test_what_fails_is_said_once_and_the_others_go_on(monkeypatch, tmp_path, where):
    bad, good, said = Recorder(where), Recorder(), []
    monkeypatch.setitem(sys.modules, "wandb", bad)
    monkeypatch.setitem(sys.modules, "trackio", good)
    trackers = Trackers(["wandb", "trackio"], tmp_path, {}, said.append)
    for record in RECORDS:
        trackers.log(record)
    trackers.finish()
    assert said == ["wandb gets no more of this run, which goes on: ConnectionError: no way to the server at all"]
    assert told("trackio", good) == TOLD and good.calls[-1][0] == "finish"
    assert len(bad.named(*where)) == 1


def test_a_job_without_a_record_begins_none(monkeypatch, tmp_path):
    package = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", package)
    Trackers(["wandb"], tmp_path, {}, print).finish()
    assert package.calls == []


def test_the_names():
    assert tuple(TRACKERS) == TRACKER_NAMES
    with pytest.raises(ConfigError, match="report_to='tensorbord': wanted some of tensorboard, wandb"):
        Job(model="m", data="d", out="o", report_to=["tensorbord"])


# ---- whole jobs


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "learn.jsonl"
    path.write_text('{"prompt": "hi", "completion": "yo"}\n' * 3)
    return str(path)


def run(capsys, model, data, out, *more):
    code = main(["train", "--model", model, "--data", data, "--out", str(out), "--max-length", "64", *more])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_a_missing_package_is_refused_before_anything_is_read(capsys, monkeypatch, tmp_path, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *more: None if wanted == name else real(wanted, *more)
    )
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(finetune, "looked_at", lambda *a: pytest.fail("it reads"))
    with pytest.raises(MissingPackageError):
        refuse_missing([name])
    code, text = run(capsys, "m", "d", tmp_path / "run", "--report-to", name)
    assert code != 0 and f"report_to='{name}': {name} is not installed; run 'pip install {name}'" in text


def test_a_job_reports_all_its_numbers(capsys, monkeypatch, model_folder, data_file, tmp_path):
    package = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", package)
    code, text = run(capsys, model_folder, data_file, tmp_path, "--steps", "2", "--report-to", "trackio", "--r", "3")
    assert code == 0, text
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [numbers["train/loss"] for _, numbers in told("trackio", package) if "train/loss" in numbers]
    assert losses == [record["loss"] for record in log if "loss" in record] and len(losses) == 2
    ((_, named),) = package.named("init")
    assert named["config"]["r"] == 3 and named["config"]["steps"] == 2 and named["name"] == tmp_path.name
    assert package.calls[-1][0] == "finish"


def test_a_run_that_breaks_ends_its_trackers(capsys, monkeypatch, model_folder, data_file, tmp_path):
    package = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", package)

    def train(*given, **more):
        given[7]({"step": 0, "eval_loss": 1.0})
        raise ConfigError("broken")

    monkeypatch.setattr(finetune, "train", train)
    assert run(capsys, model_folder, data_file, tmp_path, "--report-to", "trackio")[0] == 2
    assert package.calls[-1][0] == "finish"


def test_tensorboard_has_the_curves(capsys, model_folder, data_file, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("--report-to", "tensorboard", "--eval-every", "1")
    code, text = run(capsys, model_folder, data_file, tmp_path, "--steps", "3", *more)
    assert code == 0, text
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in log if "loss" in r]
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 1, 2, 3]
    assert run(capsys, model_folder, data_file, tmp_path, "--steps", "2", "--overwrite", *more)[0] == 0
    again = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in again.Scalars("train/loss")] == [1, 2]  # the first run is hidden


def test_wandb_takes_a_run_offline(capsys, monkeypatch, model_folder, data_file, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, text = run(capsys, model_folder, data_file, tmp_path, "--steps", "2", "--report-to", "wandb")
    assert code == 0 and "gets no more of this run" not in text, text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
