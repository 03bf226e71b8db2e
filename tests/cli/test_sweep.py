"""``minilora sweep``: a ranked table, one line for a mistake, going on after every kind of end, the same in several processes."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import safetensors.torch

from minilora.cli import main
from minilora.lab import trials_of
from minilora.lab.jobs.progress import SweepProgress
from minilora.lab.jobs.workers import Worker, shares_of
from minilora.lab.sweeps.trial import Result
from minilora.training.settings import TrainConfig

pytest.importorskip("transformers")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(autouse=True)
def plain_signals():
    """A shell may start the tests with Ctrl-C ignored, which a sweep would respect."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "learn.jsonl"
    lines = [{"prompt": f"How {n}?", "completion": f"The lamp{'!' * (n % 5)}"} for n in range(14)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def sweep(model_folder, data_file, capsys):
    """``sweep(out, *flags)``: the exit code, and all that is printed."""

    def run(out, *more):
        flags = ["--model", model_folder, "--data", data_file, "--out", str(out), "--batch-size", "2"]
        flags += [] if any("lora_alpha" in word for word in more) else ["--lora-alpha", "7"]
        code = main(["sweep", *flags, "--max-length", "48", "--device", "cpu", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def table(folder):
    return list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))


def adapters(folder):
    files = sorted(folder.glob("t*/adapter_model.safetensors"))
    return {file.parent.name: safetensors.torch.load_file(file) for file in files}


def apart(one, other):
    assert one.keys() == other.keys() and all(one[name].keys() == other[name].keys() for name in one)
    return max(float((one[name][key] - other[name][key]).abs().max()) for name in one for key in one[name])


# ---- what it does


def test_trials_are_ranked_and_every_one_leaves_its_adapter(sweep, tmp_path):
    code, text = sweep(tmp_path / "s", "--grid", "lr=1e-3,5e-2 r=2,3", "--seeds", "2", "--seed", "4", "--steps", "5")
    assert code == 0, text
    rows = table(tmp_path / "s")
    assert [(row["lr"], row["r"], row["seed"]) for row in rows[:3]] == [
        ("0.001", "2", "4"),
        ("0.001", "2", "5"),
        ("0.001", "3", "4"),
    ]
    assert sorted(adapters(tmp_path / "s")) == [row["run"] for row in rows] == [f"t{n}" for n in range(1, 9)]
    shown = re.findall(r"^(t\d) .*", text, re.M)
    losses = {row["run"]: float(row["eval_loss"]) for row in rows}
    assert shown == sorted(losses, key=losses.get) and "8 trials, 40 steps in all" in text
    assert "alike in all: variant=lora lora_alpha=7" in text
    assert f"--adapter {tmp_path}/s/{shown[0]}" in text and "generate --model" in text


def test_what_is_forgotten_is_a_column(sweep, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("The sea is calm and the night is long.\n\nNo ship is to be seen.")
    code, said = sweep(
        tmp_path / "s",
        "--grid",
        "lr=1e-3,5e-2 variant=lora,full",
        "--steps",
        "6",
        "--quant",
        "none",
        "--forget",
        str(text),
    )
    assert code == 0, said
    forgotten = {(row["variant"], row["lr"]): float(row["forgetting"]) for row in table(tmp_path / "s")}
    assert (
        len(set(forgotten.values())) == 4 and forgotten["full", "0.05"] > 0.5 and abs(forgotten["lora", "0.001"]) < 0.05
    )


def test_a_trial_that_diverges_is_said_and_the_others_go_on(sweep, tmp_path):
    wild = ("--grid", f"lora_alpha=7,{10**30}", "--init-lora-weights", "false", "--lr", "0.9", "--steps", "8")
    code, text = sweep(tmp_path / "s", *wild)
    assert code == 0, text
    first, second = table(tmp_path / "s")
    assert first["steps"] == "8" and not first["ended"] and second["ended"]
    assert "t2 ends: " in text and "t2 ended early: " in text
    assert list(adapters(tmp_path / "s")) == ["t1"]


def test_a_dry_run_lists_the_trials_and_leaves_nothing(sweep, tmp_path):
    more = ("--grid", "variant=lora,full r=2,3", "--steps", "9", "--quant", "none", "--dry-run")
    code, text = sweep(tmp_path / "s", *more)
    assert code == 0 and not (tmp_path / "s").exists(), text
    assert re.search(r"^t1: lora r=2 .*; 9 steps, together$", text, re.M)
    assert re.search(r"^t3: full lr=0.001 seed=0; 9 steps, by itself: full fine-tuning changes the base$", text, re.M)
    assert re.search(
        r"2 trials go together, 1 one after another; 27 steps in all, about \d+ s after the model is loaded", text
    )


def test_one_by_one(sweep, tmp_path):
    for name, more in (("together", ()), ("alone", ("--one-by-one",))):
        assert sweep(tmp_path / name, "--grid", "r=2,3", "--steps", "6", *more)[0] == 0
    assert apart(adapters(tmp_path / "together"), adapters(tmp_path / "alone")) <= 1e-5
    assert [row["together"] for row in table(tmp_path / "alone")] == ["no: as asked for"] * 2


def test_settings_may_stand_in_a_file(sweep, tmp_path):
    (tmp_path / "job.toml").write_text('steps = 3\nr = 2\ngrid = "lr=1e-3,2e-3"\nseeds = 1\n')
    code, text = sweep(tmp_path / "s", "--config", str(tmp_path / "job.toml"))
    assert code == 0 and [row["steps"] for row in table(tmp_path / "s")] == ["3", "3"], text


# ---- mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grid", "lr=1e-3 rr=4"], "'rr' is no setting; the closest are"),
        (["--grid", "lr=0,1e-3"], "lr=0"),
        (["--grid", "lr"], "'lr' has no value"),
        (["--grid", "r=0"], "r=0"),
        (["--grid", "target_modules=q_porj"], "'q_proj'"),
        (["--grid", "lr=1e-3", "--lr", "1e-3"], "lr stands in the grid and as --lr; give it once"),
        (["--grid", "seed=1,2", "--seeds", "2"], "seed=[1, 2] stands in the grid"),
        (["--seeds", "0"], "seeds=0"),
        (["--workers", "few"], "workers='few': wanted a whole number >= 1, or auto"),
        (["--workers", "0"], "workers=0"),
        (["--workers", "2"], "workers=2: the sweep has 1 trials; wanted no more workers than trials"),
        (["--compile"], "--compile: says how one run is computed"),
        (["--no-compile"], "--no-compile: says how one run is computed"),
        (["--push-to-hub", "a/b"], "--push-to-hub: belongs to one run"),
        (["--grid", "compile=true"], "compile=True: no setting of one run in a sweep"),
        (["--forget", "/nowhere.txt"], "/nowhere.txt"),
        (["--resume", "--overwrite"], "resume and overwrite are both set"),
        (["--eval-share", "0", "--patience", "2", "--eval-every", "1"], "patience: there is no data to evaluate on"),
        (["--tokens-at-once", "-1"], "tokens_at_once=-1"),
        (["--variant", "lora_xs", "--r", "99"], "LoRA-XS takes r of the weight's singular directions"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(sweep, tmp_path, flags, words):
    code, text = sweep(tmp_path / "s", *flags)
    line = text.splitlines()[-1]
    assert code == 2 and line.startswith("minilora: ") and words in line, text
    if flags[:2] != ["--variant", "lora_xs"]:
        assert not (tmp_path / "s").exists()


def test_what_lies_there_is_told_before_the_model_is_loaded(sweep, tmp_path, monkeypatch):
    assert sweep(tmp_path / "s", "--steps", "1", "--grid", "r=2,3")[0] == 0
    monkeypatch.setattr("minilora.job.loading.load_model", lambda *a, **b: pytest.fail("it loads"))
    code, text = sweep(tmp_path / "s", "--steps", "1", "--grid", "r=2,3")
    assert code == 2 and "holds a sweep already (sweep.json); go on with it by --resume" in text
    (tmp_path / "run").mkdir()
    for name in ("job.json", "log.jsonl"):
        (tmp_path / "run" / name).write_text("{}")
    code, text = sweep(tmp_path / "run", "--overwrite")
    assert code == 2 and "holds a run of minilora train (job.json), no sweep" in text
    assert (tmp_path / "run" / "log.jsonl").exists()


def test_overwrite_begins_anew(sweep, tmp_path):
    assert sweep(tmp_path / "s", "--steps", "2", "--grid", "r=2,3")[0] == 0
    assert sweep(tmp_path / "s", "--steps", "1", "--grid", "r=2", "--overwrite")[0] == 0
    assert list(adapters(tmp_path / "s")) == ["t1"] and [row["steps"] for row in table(tmp_path / "s")] == ["1"]


def test_torchrun_is_refused(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, text = sweep(tmp_path / "s")
    assert code == 2 and "torchrun has started several; give --workers instead" in text


# ---- ends, and going on

LONG = ("--grid", "lr=1e-3,3e-3 lora_dropout=0,0.1", "--steps", "80", "--r", "2", "--save-every", "3")


@pytest.fixture(scope="module")
def whole(model_folder, data_file, tmp_path_factory):
    """The sweep of LONG in one process, to its end."""
    out = tmp_path_factory.mktemp("whole")
    flags = ["--model", model_folder, "--data", data_file, "--out", str(out), "--batch-size", "2", "--lora-alpha", "7"]
    assert main(["sweep", *flags, "--max-length", "48", "--device", "cpu", *LONG]) == 0
    return out


def at_step(monkeypatch, step, do):
    """Do something when a trial's step is told, once."""
    note, done = SweepProgress.note, []

    def noted(self, name, record):
        note(self, name, record)
        if record["step"] >= step and "before" not in record and not done:
            done.append(name)
            do(name)

    monkeypatch.setattr(SweepProgress, "note", noted)


def test_ctrl_c_is_one_line_and_resume_ends_on_the_same_bits(sweep, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, 10, lambda name: os.kill(os.getpid(), signal.SIGINT))
        code, text = sweep(tmp_path / "s", *LONG)
    line = text.splitlines()[-1]
    assert code == 130 and re.fullmatch(
        rf"minilora: Ctrl-C after step 10 of the sweep: saved in {tmp_path}/s; go .*", line
    )
    code, text = sweep(tmp_path / "s", *LONG, "--resume")
    assert code == 0 and f"going on after step 10: {tmp_path / 's'}" in text, text
    assert apart(adapters(whole), adapters(tmp_path / "s")) == 0.0
    assert sweep(tmp_path / "s", *LONG, "--resume")[0] == 0  # where all is done already


@needs_fork
def test_a_killed_sweep_goes_on_from_its_last_state(sweep, whole, tmp_path, monkeypatch):
    child = os.fork()
    if not child:
        at_step(monkeypatch, 11, lambda name: os.kill(os.getpid(), signal.SIGKILL))
        sweep(tmp_path / "s", *LONG)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    code, text = sweep(tmp_path / "s", *LONG, "--resume")
    assert code == 0 and "going on after step 9: " in text, text
    assert apart(adapters(whole), adapters(tmp_path / "s")) == 0.0


def test_a_worker_that_is_killed_is_named_and_the_other_one_is_kept(sweep, whole, tmp_path, monkeypatch):
    started = {}
    with monkeypatch.context() as patched:
        begin = Worker.__init__

        def begun(self, number, *more):
            begin(self, number, *more)
            started[number] = self

        def kill(name):
            owner = next(worker for worker in started.values() if name in [t.name for t in worker.asked.trials])
            os.kill(owner.pid, signal.SIGKILL)
            started["killed"] = owner.number

        patched.setattr(Worker, "__init__", begun)
        at_step(patched, 4, kill)
        code, text = sweep(tmp_path / "s", *LONG, "--workers", "2", "--threads", "2")
    dead = started["killed"]
    assert code == 1 and re.search(
        rf"^worker {dead} \(t\d, t\d\) ended before its work: .* signal 9; the other goes on$", text, re.M
    )
    assert re.fullmatch(
        rf"minilora: worker {dead} .* saved in {tmp_path}/s; go on with --resume .*", text.splitlines()[-1]
    )
    rows = table(tmp_path / "s")
    assert sorted(int(row["done"]) == 80 for row in rows) == [False, False, True, True]
    code, text = sweep(tmp_path / "s", *LONG, "--workers", "2", "--threads", "2", "--resume")
    assert code == 0 and "1 worker with 1 thread" in text, text
    assert apart(adapters(whole), adapters(tmp_path / "s")) <= 1e-5
    same = ("run", "lr", "seed", "steps", "lora_dropout", "parameters", "together", "ended")
    assert [[row[name] for name in same] for row in table(tmp_path / "s")] == [
        [row[name] for name in same] for row in table(whole)
    ]
    for one, other in zip(table(tmp_path / "s"), table(whole), strict=True):
        assert float(one["eval_loss"]) == pytest.approx(float(other["eval_loss"]), abs=1e-5)
    files = {path.name for path in (tmp_path / "s").iterdir()}
    assert files == {path.name for path in whole.iterdir()}


def test_ctrl_c_reaches_all_workers(sweep, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, 4, lambda name: os.kill(os.getpid(), signal.SIGINT))
        code, text = sweep(tmp_path / "s", *LONG, "--workers", "2")
    assert code == 130 and "minilora: Ctrl-C after step " in text.splitlines()[-1], text
    states = (tmp_path / "s").glob("worker-*/state.json")
    done = [json.loads(state.read_text())["steps"] for state in states]
    assert done and max(done) < 80
    code, text = sweep(tmp_path / "s", *LONG, "--resume")
    assert code == 0 and "was shared out among 2 workers, and goes on so" in text, text
    assert apart(adapters(whole), adapters(tmp_path / "s")) <= 1e-5


def test_a_worker_ends_when_the_first_process_is_gone():
    source = (
        "import os, sys, time; from minilora.lab.jobs.workers import _hold_on; os.close(1); _hold_on(); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.read()  # it holds on
    child.stdin.close()
    assert child.wait(30) == -signal.SIGTERM
    child.stdout.close()


# ---- parts


def test_shares_are_about_equal_and_keep_a_seed_together():
    trials = trials_of("lr=1e-3,2e-3", seeds=4, train=TrainConfig(steps=10))
    named = [type(t)(t.lora, t.train, t.variant, f"t{n}") for n, t in enumerate(trials, 1)]
    assert shares_of(named, 2) == [["t1", "t2", "t5", "t6"], ["t3", "t4", "t7", "t8"]]
    for count in range(1, 9):
        shares = shares_of(named, count)
        assert (
            len(shares) == count
            and all(shares)
            and sorted(name for own in shares for name in own) == [t.name for t in named]
        )
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    long = [type(t)(t.lora, TrainConfig(steps=10 if n else 90), None, f"t{n}") for n, t in enumerate(trials)]
    assert shares_of(long, 2)[0] == ["t0"]


@pytest.mark.parametrize(
    ("threads", "words"),
    [("1", "workers: 1, because there is one thread"), ("3", r"workers: 2, because the model is small \(\d\.\d MB\)")],
)
def test_auto_says_what_it_takes(sweep, tmp_path, threads, words):
    more = ("--grid", "r=2,3", "--steps", "3", "--workers", "auto", "--threads", threads, "--dry-run")
    code, text = sweep(tmp_path / "s", *more)
    assert code == 0 and re.search(words, text), text


def test_auto_leaves_a_large_model_in_one_process(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.lab.jobs.shared._SMALL", 1000)
    code, text = sweep(tmp_path / "s", "--grid", "r=2,3", "--steps", "2", "--workers", "auto", "--threads", "2")
    assert code == 0 and "workers: 1, because a copy of the model for each worker would take" in text


def test_what_is_shown_without_a_terminal(monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("minilora.lab.jobs.progress.time.monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with SweepProgress(stream) as progress:
        progress.plan({"t1": 10, "t2": 10})
        progress.note("t1", {"step": 0, "eval_loss": 9.0})
        progress.note("t1", {"step": 1, "loss": 3.0})
        progress.note("t2", {"step": 1, "loss": 2.0})
        progress.note("t2", {"step": 1, "ended": "the loss is nan"})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0/20  2 going, 0 ended"
    assert re.fullmatch(r"step 2/20  2 going, 0 ended  best 2.000 \(t2\)  \d+ s left", lines[2])
    assert lines[3].startswith("step 2/11  1 going, 1 ended (1 early)  best 3.000 (t1)")


def test_full_fine_tuning_comes_once_for_all_ranks():
    kinds = [trial.lora for trial in trials_of("variant=lora,full r=2,3", seeds=2)]
    assert len(kinds) == 6 and kinds.count(None) == 2


def test_those_that_ended_early_are_last():
    from minilora.lab.jobs.shown import as_table, ranked

    trials = trials_of("lr=1e-3,2e-3,3e-3", train=TrainConfig(steps=2))
    results = [Result(trial, f"t{n}") for n, trial in enumerate(trials, 1)]
    for result, loss in zip(results, (1.0, 3.0, 2.0), strict=True):
        result.records = [{"step": 1, "loss": loss}]
    results[0].ended = "the loss is nan"
    assert [result.name for result in ranked(results)] == ["t3", "t2", "t1"]
    assert as_table(results).splitlines()[-1] == "t1 ended early: the loss is nan"
