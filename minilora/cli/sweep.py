"""``minilora sweep``: many fine-tunings of one model at the same time, from a grid in words; those that can share a pass share it."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

from minilora.cli.flags import Flag, add_flags, flag_of
from minilora.cli.given import given_of
from minilora.cli.plugins import add_plugin_flag, load_plugins
from minilora.cli.program import command
from minilora.cli.say import say
from minilora.cli.settings import groups
from minilora.errors import ConfigError
from minilora.job.given import job_from, setting_names

USAGE = '--model NAME --data FILE --grid "NAME=VALUE,VALUE ..." --out FOLDER [options]'
EXAMPLES = """\
  minilora sweep --model smollm2 --data chats.jsonl --grid "lr=3e-4,1e-3,3e-3 r=4,16" --seeds 3 --out sweep
  minilora sweep --model smollm2 --data chats.jsonl --grid "variant=lora,dora,vera" --out variants --dry-run
  minilora sweep --model ./tiny --data chats.jsonl --grid "lr=1e-3,3e-3" --seeds 4 --workers auto --out seeds --resume"""

_ONE_RUN = "belongs to one run, and a sweep has many; give it to minilora train"
_OWN_WAY = "says how one run is computed, and a sweep computes many in its own way; leave it out"
_KEPT = "a sweep keeps one state, from which --resume goes on; --save-every says how often"
# Flags of ``minilora train`` that a sweep has not, and why.
REFUSED = {
    "init_from": _ONE_RUN, "allow_other_base": _ONE_RUN, "prompts": _ONE_RUN, "max_new_tokens": _ONE_RUN,
    "report_to": _ONE_RUN, "push_to_hub": _ONE_RUN, "private": _ONE_RUN,
    "compile": _OWN_WAY, "offload": _OWN_WAY, "profile": _OWN_WAY,
    "shard": "a sweep is in one process, or shared out by --workers; leave it out",
    "keep_checkpoints": _KEPT,
}  # fmt: skip
TEXTS = {
    "out": "folder for the table, the log and an adapter for each trial; made if it is not there",
    "seed": "whole number from which the seeds of the trials count up, and by which examples are held out",
    "save_every": "optimizer steps between states that --resume can go on from; 0 is at the end and at Ctrl-C",
    "resume": "go on with the sweep that lies in --out, to the same bits",
    "overwrite": "remove the sweep that lies in --out, and begin anew",
    "dry_run": "list the trials, which go together and how long it will take; nothing is kept, nothing is written",
}
# What no run has.
OWN = [
    Flag("grid", str, "", 'fields of the adapter and of training with their values, as in "lr=3e-4,1e-3 r=4,16 variant=lora,dora"; '
         'every combination is a trial; "variant=full" is full fine-tuning, "+" joins names of layers'),
    Flag("seeds", int, 1, "number of seeds that every combination is trained with"),
    Flag("one_by_one", bool, False, "run the trials one after another, and none together"),
    Flag("tokens_at_once", int, 0, "tokens of all trials of a call, at most; 0 is 512 on a CPU and 16,384 on a GPU"),
    Flag("workers", str, "1", "processes of this computer that the trials are shared out among, each with an equal part of the threads; "
         "auto takes one for each thread, 8 at most, where the model is 200 MB at most, else one"),
    Flag("forget", str, None, "file of text; how far a trial moved the predictions on it (KL, nats a token) is a column of the table"),
]  # fmt: skip


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora sweep`` takes: the settings of a job, without those of one run, and its own."""
    add_plugin_flag(parser)
    config = "TOML file with flags as keys (lora_alpha = 16); a flag on the command line wins"
    add_flags(parser, "options", [Flag("config", str, None, config)])
    for group, of_it in _groups().items():
        add_flags(parser, group, of_it, unset=True)
    parser.refused = {flag_of(name): why for name, why in REFUSED.items()}  # type: ignore[attr-defined]


def _groups() -> dict[str, list[Flag]]:
    own = {
        "training": ("grid", "seeds"),
        "evaluation": ("forget",),
        "speed and memory": ("one_by_one", "tokens_at_once", "workers"),
    }
    mine = {flag.name: flag for flag in OWN}
    return {
        group: [mine[name] for name in own.get(group, ())]
        + [_reworded(flag) for flag in of_job if flag.name not in REFUSED]
        for group, of_job in groups().items()
    }


def _reworded(flag: Flag) -> Flag:
    return dataclasses.replace(flag, about=TEXTS.get(flag.name, flag.about))


def run(arguments: argparse.Namespace) -> None:
    """Look, sweep, and rank the trials; or say what a sweep would do."""
    asked, workers = asked_for(given(arguments))
    from minilora.lab.jobs.job import look
    from minilora.lab.jobs.progress import SweepProgress
    from minilora.lab.jobs.shared import foretold
    from minilora.lab.jobs.shared import run as sweep
    from minilora.lab.jobs.shown import as_table
    from minilora.lab.sweeps.table import as_csv
    from minilora.lab.verdicts.groups import read_table
    from minilora.lab.verdicts.verdict import closing

    with SweepProgress() as progress:
        ready = look(asked, progress.say, progress.plan)
        if asked.job.dry_run:
            foretold(ready, workers, progress.say)
            say(f"dry run: nothing was trained, and nothing is written into {asked.folder}")
            return
        before = partial(load_plugins, arguments.plugin) if arguments.plugin else None
        results = sweep(ready, workers, progress.say, progress.note, before)
    say(f"\n{as_table(results)}\n")
    for line in closing(read_table(as_csv(results))):
        say(line)
    _say_where(asked, results)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags and the TOML file say, by name. Raises ``ConfigError``."""
    known = {flag.name: flag.kind for of_it in _groups().values() for flag in of_it}
    return given_of(arguments, known)


def job_of(arguments: argparse.Namespace) -> Any:
    """The job whose settings all trials have where the grid says nothing. Raises ``ConfigError``."""
    return asked_for(given(arguments))[0].job


def asked_for(said: dict[str, Any]) -> tuple[Any, int | str]:
    """The sweep that is asked for, and among how many workers. Raises ``ConfigError`` for a value that cannot be meant, by name."""
    rest = dict(said)
    own = {flag.name: rest.pop(flag.name, flag.default) for flag in OWN}
    save_every = rest.pop("save_every", 0)
    job = job_from(rest)
    if own["seeds"] < 1:
        raise ConfigError(f"seeds={own['seeds']}: wanted a whole number >= 1")
    workers = own["workers"] if own["workers"] == "auto" else _whole("workers", own["workers"])
    from minilora.lab.jobs.job import SweepJob
    from minilora.lab.sweeps.grid import axes_of, trials_of

    for name in axes_of(own["grid"]):
        if name in said and name in setting_names():
            raise ConfigError(f"{name} stands in the grid and as {flag_of(name)}; give it once")
    seeds = list(range(job.training.seed, job.training.seed + own["seeds"]))
    trials = trials_of(own["grid"], seeds, job.lora, job.training, job.variant or None)
    options = {
        "together": not own["one_by_one"],
        "tokens_at_once": own["tokens_at_once"],
        "forget": own["forget"] or "",
    }
    return SweepJob(job, trials, save_every, **options), workers


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text[:100]!r}: wanted a whole number >= 1, or auto") from None


def _say_where(asked: Any, results: Any) -> None:
    """Where all of it lies, and what to do next."""
    from minilora.lab.jobs.shown import ranked
    from minilora.lab.verdicts.report import sweep_report

    best = ranked(results)[0]
    say(f"{asked.folder}: runs.csv, log.jsonl, and an adapter for each trial; look at {sweep_report(asked.folder)}")
    if not best.ended and best.trial.lora is not None:
        words = ["--model", asked.job.model, "--quant", asked.job.quant, "--adapter", str(asked.folder / best.name)]
        say(f"next: {command('generate', *words, 'Who are you?')}")
