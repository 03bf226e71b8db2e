"""``minilora train``: a fine-tuning job from flags, a TOML file, or both."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag, add_flags
from minilora.cli.given import given_of
from minilora.cli.jobs import run_job
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.settings import groups, settings
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
    return job_from(given_of(arguments, {name: flag.kind for name, flag in settings().items()}))
