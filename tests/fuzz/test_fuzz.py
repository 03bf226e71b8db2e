"""A short run of ``fuzz.py``, the same on every run; ``make fuzz`` runs the long one."""

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
engine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(engine)


@pytest.mark.parametrize(
    ("target", "count"), [("header", 60_000), ("config", 40_000), ("seal", 20_000), ("folder", 1_500)]
)
def test_mutated_files_are_refused_or_read(target, count):
    done, failures = engine.fuzz(count, seed=1, targets=(target,))
    assert done == {target: count} and not failures, failures[0][1]


@pytest.mark.filterwarnings(
    "ignore:.* specified but will be ignored:UserWarning"
)  # settings of a start that is not asked for
def test_both_outcomes_come_about(tmp_path):
    """A fuzzer whose every input is refused at the door tests nothing behind it."""
    draw, outcomes = engine.random.Random(2), {}
    for target in ("header", "config"):
        seeds = engine.seeds(tmp_path)[target]
        for _ in range(2_000):
            _, check = getattr(engine, target)(draw, draw.choice(seeds))
            try:
                check()
                outcome = "read"
            except engine.MiniLoraError:
                outcome = "refused"
            outcomes[target, outcome] = outcomes.get((target, outcome), 0) + 1
    assert len(outcomes) == 4 and min(outcomes.values()) > 100, outcomes


def test_a_reader_that_breaks_is_seen(monkeypatch):
    def broken(raw, where):
        raise KeyError("x")

    monkeypatch.setattr(engine, "parse_header", broken)
    assert len(engine.fuzz(500, targets=("header",))[1]) == 20


def test_a_reader_that_hangs_is_seen(monkeypatch):
    monkeypatch.setattr(engine, "LIMIT", 0.05)
    wrong = engine.judge(lambda: engine.time.sleep(0.01))
    assert wrong is None
    before = engine.signal.signal(engine.signal.SIGPROF, engine.too_long)

    def forever():
        while True:
            pass

    try:
        assert "took longer than" in engine.judge(forever)
    finally:
        engine.signal.signal(engine.signal.SIGPROF, before)


def test_a_folder_that_is_refused_and_leaves_a_trace_is_seen(tmp_path, monkeypatch):
    def load(model, folder):
        model["first"].weight.data[0, 0] += 1
        raise engine.MiniLoraError("refused")

    monkeypatch.setattr(engine, "load_adapter", load)
    failures = engine.fuzz(25, targets=("folder",))[1]
    assert "a refused folder changed the model" in failures[0][1]
    assert torch.is_grad_enabled()
