"""``minilora bench``: the same fine-tuning job in minilora and in PEFT, side by side."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.say import say
from minilora.cli.trial import add_job_flags, check_page, settings_of, title_of, write_page
from minilora.hf.trials import BenchJob

USAGE = "[--model NAME] [options]"
EXAMPLES = """\
  minilora bench --model smollm2 --r 16 --batch 2 --seq 64 --threads 1 --steps 4
  minilora bench --model smollm2 --quant nf4 --data random --markdown --html bench.html"""

_OWN = ("steps", "repeats", "lr", "seed", "data")


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora bench`` takes."""
    add_job_flags(parser)
    own = fields_of(BenchJob, _OWN)
    add_flags(parser, "data", [own.pop("data")])
    add_flags(parser, "training", own.values())
    add_flags(parser, "output", [Flag("markdown", bool, False, "print the table as markdown")])


def run(arguments: argparse.Namespace) -> None:
    """Run, print the table, write the page if asked. Progress goes to standard error."""
    check_page(arguments.html)
    own = {name: getattr(arguments, name) for name in _OWN}
    job = BenchJob(**settings_of(arguments), **own)
    from minilora.hf.bench import run as run_job
    from minilora.hf.plan import on_this_machine
    from minilora.measure.bench import agreement, as_rows
    from minilora.report.tables import as_markdown, as_text

    job, place = on_this_machine(job)
    sides, missing = run_job(job, lambda line: say(line, error=True))
    _, words = agreement(sides, job.dtype)
    columns, rows = as_rows(sides, job.batch * job.seq)
    table = as_markdown(columns, rows) if arguments.markdown else as_text(columns, rows)
    counted = f"{len(sides[0].timed)} steps timed for each library, in turns; the first of each run is not counted."
    notes = [*filter(None, [words, counted, *missing, f"On {place.said}.", _versions(sides)])]
    say(f"{title_of(job)}\n\n{table}\n\n" + "\n".join(notes))
    if arguments.html:
        _write(arguments.html, job, sides, columns, rows, notes)


def _versions(sides: Any) -> str:
    import torch

    every = {name: version for side in sides for name, version in side.versions.items()} | {"torch": torch.__version__}
    return ", ".join(f"{name} {version}" for name, version in every.items()) + f", {platform.machine()}."


def _write(file: str, job: Any, sides: Any, columns: Any, rows: Any, notes: list[str]) -> None:
    tiles = [{"label": f"{s.name.split()[0]}: time per step", "value": f"{s.median:.3f} s"} for s in sides]
    tiles += [
        {"label": f"{s.name.split()[0]}: peak memory", "value": f"{s.peak / 1e6:,.0f} MB"} for s in sides if s.peak
    ]
    losses = {side.name: side.losses[0] for side in sides}
    write_page(file, "One job, side by side", title_of(job), tiles, columns, rows, notes, losses, vars(job))
