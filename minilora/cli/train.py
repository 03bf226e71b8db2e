"""``minilora train``: a fine-tuning job from flags, a TOML file, or both."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag, add_flags, flag_of
from minilora.cli.jobs import run_job
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.settings import FLAG_ALONE, groups, settings
from minilora.cli.toml import ONE_OR_SEVERAL, REGEX_FLAGS, read_toml
from minilora.errors import ConfigError
from minilora.job.given import job_from
from minilora.job.settings import Job

USAGE = "--model NAME --data FILE --out FOLDER [options]"
EXAMPLES = """\
  minilora train --model smollm2 --data chats.jsonl --out runs/mine --epochs 3 --prompts "How is the weather?"
  minilora train --model ./llama --data chats.jsonl --out runs/long --batch-size 1 --accumulate 16 --save-every 50 --resume
  minilora train --model smollm2 --data chats.jsonl books.parquet:0.5 --eval-data held.csv --out runs/both
  minilora train --config job.toml --lr 2e-4"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora train`` takes."""
    add_plugin_flag(parser)
    config = "TOML file with flags as keys (lora_alpha = 16); a flag on the command line wins"
    add_flags(parser, "options", [Flag("config", str, None, config)])
    for group, of_it in groups().items():
        add_flags(parser, group, of_it, unset=True)


def run(arguments: argparse.Namespace) -> None:
    """Fine-tune, and say what came of it."""
    run_job(job_of(arguments))


def job_of(arguments: argparse.Namespace) -> Job:
    """The job that the flags and the TOML file ask for. Raises ``ConfigError`` for a value that cannot be meant, by name."""
    known = {name: flag.kind for name, flag in settings().items()}
    given = read_toml(arguments.config, known) if arguments.config else {}
    for name in FLAG_ALONE:
        if given.get(name):
            raise ConfigError(
                f"{arguments.config}: {name}: a file may not let code run; give {flag_of(name)} on the command line"
            )
    flags = {name: value for name in known if (value := getattr(arguments, name)) is not None}
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags and other not in flags:  # the command line says how long the run is, whatever the file says
            given.pop(other, None)
    given |= flags
    for name in ("model", "data", "out"):
        if not given.get(name):
            raise ConfigError(f'--{name} is missing; give it as a flag or as {name} = "..." in the TOML file')
    for name in ONE_OR_SEVERAL:
        if isinstance(value := given.get(name), list) and len(value) == 1:
            given[name] = value[0]
    for name in REGEX_FLAGS:
        if isinstance(value := given.get(name), list) and len(value) == 1:
            given[name] = value[0] if value[0] == "all-linear" or not value[0].replace("_", "").isalnum() else value
    alpha = given.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        given["lora_alpha"] = int(alpha)
    return job_from(given)
