"""A sweep from the name of a model to its folder: what ``minilora sweep`` does.

The data and the model come by the road of a job (``job/loading.py``); what can be refused without a weight is refused before one is read.
Next file: ``lab/jobs/workers.py``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora.data.examples import digests
from minilora.errors import ConfigError
from minilora.files import validate
from minilora.hf.devices import Place, choose, settled
from minilora.job.examples import looked_at
from minilora.job.loading import Prepared, computing_with, load, prepare
from minilora.job.settings import Job
from minilora.job.told import say_packed
from minilora.lab.jobs.forget import examples_of, measure_on
from minilora.lab.sweeps.left import claim, refuse_in_the_way
from minilora.lab.sweeps.sweeping import names_of, sweep
from minilora.lab.sweeps.trial import Result, Trial
from minilora.training.best import refuse_without_evaluations
from minilora.training.optim_choice import refuse_optimizer

__all__ = ["Ready", "SweepJob", "look", "run_here"]

_Say = Callable[[str], None]
_Watch = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class SweepJob:
    """What a sweep is asked to do.

    Args:
        job: its model, data, place and folder; not its adapter and training, which each trial has of its own, but the seed, by which the
            examples to evaluate on are held out: they are the same for all trials.
        trials: what to train; each is given its name.
        save_every, together, tokens_at_once: as ``sweep``.
        forget: file of text on which it is measured what a trial has forgotten; "" measures nothing.

    Raises:
        ConfigError: a value that cannot be meant, or a setting of one run (``prompts``, ``init_from``, ``shard``, ``push_to_hub``,
            ``report_to``), by name.
    """

    job: Job
    trials: Sequence[Trial]
    save_every: int = 0
    together: bool = True
    tokens_at_once: int = 0
    forget: str = ""

    def __post_init__(self) -> None:
        for name in ("prompts", "init_from", "shard", "push_to_hub", "report_to"):
            if getattr(self.job, name):
                raise ConfigError(f"{name}: belongs to one run, and a sweep has many; leave it out")
        for name in ("save_every", "tokens_at_once"):
            validate.whole(name, getattr(self, name), 0)
        if self.forget:
            validate.text("forget", self.forget)
        named = zip(self.trials, names_of(self.trials), strict=True)
        object.__setattr__(self, "trials", tuple(replace(trial, name=name) for trial, name in named))
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ConfigError(
                "a sweep is begun by one process, and torchrun has started several; give --workers instead"
            )

    @property
    def folder(self) -> Path:
        """Where all of it goes."""
        return Path(self.job.out)


@dataclass(frozen=True)
class Ready:
    """A sweep that was looked at: nothing stands against it before the model is loaded.

    Attributes:
        asked: with the device, the dtype and the steps that were found. texts: the examples of ``forget``.
    """

    asked: SweepJob
    place: Place
    prepared: Prepared
    texts: Sequence[Any] = field(default=())


def look(asked: SweepJob, say: _Say, begun: Callable[[dict[str, int]], None] = lambda lengths: None) -> Ready:
    """Everything before the model: the folder, the device, the data, the targets of all trials. ``begun`` gets the steps by trial.

    Raises:
        MiniLoraError: what is not as it should be, in one line; nothing is written.
    """
    job, trials = asked.job, asked.trials
    place = choose(job.device, job.dtype, job.attention)
    for config in {trial.train.optimizer: trial.train for trial in trials}.values():
        refuse_optimizer(config, place.device)
    claim(asked.folder, job.resume, job.overwrite)
    refuse_in_the_way(asked.folder, [trial.name for trial in trials])
    looked = looked_at(job, say)
    first = replace(trials[0].train, seed=job.training.seed)
    configs = {repr(trial.lora): trial.lora for trial in trials if trial.lora is not None}
    prepared = prepare(replace(job, training=first), place, looked, list(configs.values()), say)
    for trial in trials:
        refuse_without_evaluations(trial.train, prepared.evaluation)
    texts = examples_of(job, asked.forget, prepared.tokenizer, prepared.paper, say) if asked.forget else ()
    count = len(prepared.examples)
    trials = tuple(replace(trial, train=trial.train.for_examples(count)) for trial in trials)
    steps = {trial.name: trial.train.steps for trial in trials}
    say(f"{len(trials)} trial{'s' * (len(trials) > 1)}, {sum(steps.values())} steps in all")
    begun(steps)
    return Ready(replace(asked, job=settled(job, place), trials=trials), place, prepared, texts)


def run_here(ready: Ready, say: _Say, watch: _Watch | None = None, all_refused: bool = False) -> list[Result]:
    """Load the model, and sweep in this process. Raises as ``sweep``."""
    asked, job, found = ready.asked, ready.asked.job, ready.prepared
    pad_id = found.tokenizer.pad_token_id
    with computing_with(job.threads):
        model = load(job, ready.place)
        say_packed(job, model, say)
        options: dict[str, Any] = {"save_every": asked.save_every, "together": asked.together}
        if ready.texts:
            options["measure"] = measure_on(model, ready.texts, pad_id)
            options["measured_on"] = hashlib.sha256(b"".join(digests(ready.texts))).hexdigest()
        options |= {"tokens_at_once": asked.tokens_at_once, "start_examples": job.start_examples}
        options |= {"folder": job.out, "resume": job.resume, "overwrite": job.overwrite, "all_refused": all_refused}
        options |= {"evaluation": found.evaluation, "pad_id": pad_id, "say": say, "watch": watch}
        return sweep(model, found.examples, asked.trials, **options)
