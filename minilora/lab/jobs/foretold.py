"""A dry run of a sweep: its trials, which of them go together, and how long it will take. Nothing is kept, and nothing is written.

Every trial does one real step, twice: the first time warms up, the second is timed. Next file: ``lab/jobs/shared.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minilora.errors import ConfigError
from minilora.job.loading import computing_with, load
from minilora.job.told import say_packed
from minilora.lab.jobs.job import Ready
from minilora.lab.sweeps.sweeping import sweep
from minilora.lab.sweeps.table import differing, label
from minilora.lab.sweeps.trial import Result, Trial
from minilora.training.losses import evaluate

__all__ = ["foretell"]

_BATCHES = 8  # of the evaluation that are timed


def foretell(ready: Ready, shares: Sequence[Sequence[str]], threads: int, say: Callable[[str], None]) -> None:
    """Say all of it.

    Args:
        shares: the names of the trials of each process. threads: of each.

    Raises:
        ConfigError: no trial can begin, with the first one's reason.
    """
    with computing_with(threads):
        model = load(ready.asked.job, ready.place)
        say_packed(ready.asked.job, model, say)
        results = _one_step_each(ready, model, say)
        per_evaluation = _evaluation_seconds(ready, model)
    trials = ready.asked.trials
    names = [name for name in differing(trials) if name not in ("steps", "epochs")]
    for trial, result in zip(trials, results, strict=True):
        how = (
            f"cannot begin: {result.ended}"
            if result.ended
            else f"by itself: {result.alone}"
            if result.alone
            else "together"
        )
        say(f"{trial.name}: {label(trial, names)}; {trial.train.steps} steps, {how}")
    seconds = {
        result.name: trial.train.steps * result.seconds + _evaluations(ready, trial) * per_evaluation
        for trial, result in zip(trials, results, strict=True)
        if not result.ended
    }
    if not seconds:
        raise ConfigError(results[0].ended)
    _say_sum(trials, results, shares, seconds, say)


def _one_step_each(ready: Ready, model: Any, say: Callable[[str], None]) -> list[Result]:
    short = [replace(trial, train=_of_one_step(trial)) for trial in ready.asked.trials]
    options: dict[str, Any] = {"pad_id": ready.prepared.tokenizer.pad_token_id, "together": ready.asked.together}
    options |= {"tokens_at_once": ready.asked.tokens_at_once, "start_examples": ready.asked.job.start_examples}
    options |= {"all_refused": True, "say": lambda line: None}
    say(f"trying a step of {'the trial' if len(short) == 1 else f'each of {len(short)} trials'}, twice")
    sweep(model, ready.prepared.examples, short, **options)
    return sweep(model, ready.prepared.examples, short, **options)


def _of_one_step(trial: Trial) -> Any:
    """Its settings for one step, without those that speak of more."""
    decay = 0.0 if trial.train.schedule == "wsd" else trial.train.decay
    return replace(
        trial.train, steps=1, warmup=0.0, decay=decay, eval_every=0, patience=0, min_delta=0.0, keep_best=False
    )


def _evaluation_seconds(ready: Ready, model: Any) -> float:
    """Of one evaluation of one trial, by a part of it."""
    size, found = ready.asked.job.training.batch_size, ready.prepared.evaluation
    if not found:
        return 0.0
    some = [found[at] for at in range(min(len(found), size * _BATCHES))]
    begun = time.monotonic()
    evaluate(model, some, size, ready.prepared.tokenizer.pad_token_id)
    return (time.monotonic() - begun) * len(found) / len(some)


def _evaluations(ready: Ready, trial: Trial) -> int:
    """How often a trial is evaluated: before the first step, in between, after the last."""
    every, steps = trial.train.eval_every, trial.train.steps
    return 2 + ((steps - 1) // every if every else 0) if ready.prepared.evaluation else 0


def _say_sum(
    trials: Sequence[Trial],
    results: Sequence[Result],
    shares: Sequence[Sequence[str]],
    seconds: dict[str, float],
    say: Callable[[str], None],
) -> None:
    alone = sum(bool(result.alone) for result in results if not result.ended)
    steps = sum(trial.train.steps for trial in trials if trial.name in seconds)
    longest = max(sum(seconds.get(name, 0.0) for name in names) for names in shares)
    among = f" in {len(shares)} processes" if len(shares) > 1 else ""
    say(
        f"{_trials(len(seconds) - alone)} together, {alone} one after another; {steps} steps in all, about {_time(longest)}{among} "
        "after the model is loaded"
    )


def _trials(count: int) -> str:
    return "1 trial goes" if count == 1 else f"{count} trials go"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
