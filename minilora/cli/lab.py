"""``minilora lab``: the claims of the field, tried again on a small ground, each with a verdict."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.cli.flags import Flag, add_flags
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.program import command
from minilora.cli.say import say
from minilora.errors import ConfigError, TrainingError

USAGE = "[CLAIM ...] [--all] [--out FOLDER] [options]"
EXAMPLES = """\
  minilora lab
  minilora lab rank-lr
  minilora lab --all --out lab --workers 2
  minilora lab variants --plugin my_variant.py"""

STEPS = 60  # that of ``lab/ground/ground.py``, which needs torch
VARIANTS = "variants"
_EVERY = 10.0  # seconds between two lines of progress


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora lab`` takes."""
    about = f'claims to try, or "{VARIANTS}" for a table of all variants of LoRA; without a name the claims are listed (default: none)'
    parser.add_argument("names", metavar="CLAIM", nargs="*", default=[], help=about)
    add_plugin_flag(parser)
    steps = Flag("steps", int, STEPS, "optimizer steps of every fine-tuning; a verdict is about this number of them")
    add_flags(parser, "training", [Flag("all", bool, False, "try every claim, into --out"), steps])
    workers = Flag("workers", int, 1, "number of processes that share the claims of --out, each of one thread")
    add_flags(parser, "speed and memory", [workers])
    out = "write a page of the claims with figures, lab.md, and lab.json; claims that are there are not tried again"
    anew = Flag("overwrite", bool, False, "try the claims anew that are in --out")
    add_flags(parser, "output", [Flag("out", str, None, out), anew])


def run(arguments: argparse.Namespace) -> None:
    """List, try, or print the table of variants."""
    _check(arguments)
    from minilora.lab.claims import claim, claims

    names = list(claims()) if arguments.all else arguments.names
    if names == [VARIANTS]:
        return _variants(arguments)
    if not names:
        return _list(claims())
    for name in names:
        claim(name)
    if arguments.out:
        return _into(Path(arguments.out), names, arguments)
    for number, name in enumerate(names):
        _try(name, arguments.steps, gap=number > 0)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that would do nothing, and values that cannot be meant. Raises ``ConfigError``."""
    from minilora.files.validate import whole

    whole("steps", arguments.steps, 1)
    whole("workers", arguments.workers, 1)
    if VARIANTS in arguments.names and (len(arguments.names) > 1 or arguments.all or arguments.out):
        raise ConfigError(f"{VARIANTS}: its table is printed by itself; leave out other claims, --all and --out")
    if arguments.plugin and arguments.names != [VARIANTS]:
        raise ConfigError(f"--plugin: no claim asks for a variant of your own; minilora lab {VARIANTS} does")
    if arguments.all and arguments.names:
        raise ConfigError(f"--all: means every claim; leave out {' '.join(arguments.names)}, or --all")
    if arguments.all and not arguments.out:
        raise ConfigError("--all: takes long, so what it finds is kept in a folder; add --out FOLDER")
    if not arguments.out and (arguments.workers > 1 or arguments.overwrite):
        flag = "--overwrite" if arguments.overwrite else "--workers"
        raise ConfigError(f"{flag}: is about a folder that keeps what is found; add --out FOLDER, or leave it out")
    if arguments.out and not arguments.names and not arguments.all:
        raise ConfigError("--out: no claim is named; name some, or give --all")


def _list(every: dict[str, Any]) -> None:
    for module in every.values():
        said = module.CLAIM
        say(f"{said.name}\n  {said.sentence}\n  {said.source}: {said.number}")
    say(f"\nnext: {command('lab', next(iter(every)))}")


# ---- one claim, or the table, in this process


def _try(name: str, steps: int, gap: bool) -> None:
    """Try one claim, and say what came of it."""
    from minilora.lab.claims import claim
    from minilora.lab.trying.cells import as_lines
    from minilora.lab.trying.tries import try_claim

    said = claim(name).CLAIM
    say(f"{chr(10) * gap}{said.name}: {said.sentence}\n{said.source}: {said.number}")
    tried = try_claim(name, _ground(steps))
    assert tried.finding is not None
    say("\n" + "\n\n".join(filter(None, [tried.finding.said, as_lines(tried.finding.rows)])))
    say(f"\n{tried.finding.verdict} ({tried.seconds:,.1f} s)")


def _variants(arguments: argparse.Namespace) -> None:
    from minilora.lab.trying.cells import as_lines
    from minilora.lab.variants import KNOWN, fair_table
    from minilora.lora.adapter import VARIANTS as REGISTERED

    began = time.perf_counter()
    own = [name for name, kind in REGISTERED.items() if not kind.__module__.startswith("minilora.")]
    say(as_lines(fair_table(_ground(arguments.steps), [*KNOWN, *own])))
    say(f"\n{time.perf_counter() - began:,.1f} s")


def _ground(steps: int) -> Any:
    """A ground whose progress goes to standard error."""
    from minilora.lab.ground.ground import Ground

    return Ground(steps, say=lambda line: say(line, error=True), watch=_progress())


def _progress() -> Callable[[int, int], None]:
    """A line every ten seconds, and one at the end."""
    last = time.monotonic()

    def watch(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY or done == total:
            last = time.monotonic()
            say(f"  {done:,} of {total:,} steps", error=True)

    return watch


# ---- many, into a folder


def _into(folder: Path, names: list[str], arguments: argparse.Namespace) -> None:
    """Try claims into a folder; a line for each, and an error at the end if one could not be tried."""
    from minilora.lab.trying.page import PAGE_FILE
    from minilora.lab.trying.tries import try_into
    from minilora.report.canvas import missing

    options = {name: getattr(arguments, name) for name in ("steps", "workers", "overwrite")}
    found = try_into(folder, names, **options, say=say)
    if why := missing():
        say(f"no figures: {why}", error=True)
    failed = [name for name in names if found[name].finding is None]
    say(f"{folder / PAGE_FILE}: {len(found) - len(failed)} claims")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(names)} claims could not be tried: {', '.join(failed)}; the same command tries them again"
        )
