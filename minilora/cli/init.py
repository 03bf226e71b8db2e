"""``minilora init``: a settings file and ten lines of data to begin with."""

from __future__ import annotations

import argparse
from pathlib import Path

from minilora.cli.program import command
from minilora.cli.say import say
from minilora.cli.template import settings_file
from minilora.demo import STARTER
from minilora.errors import CheckpointError
from minilora.files.read import refuse_path
from minilora.files.write import write_file

USAGE = "[FOLDER]"
EXAMPLES = """\
  minilora init
  minilora init bicycles"""

SETTINGS, DATA = "job.toml", "chats.jsonl"


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora init`` takes."""
    where = "folder for job.toml and chats.jsonl, made if it is not there; neither may lie in it (default: .)"
    parser.add_argument("folder", nargs="?", default=".", help=where)


def run(arguments: argparse.Namespace) -> None:
    """Write both files, or none if one is there already; say what comes next."""
    place = Path(arguments.folder)
    refuse_path(place)
    settings, data = place / SETTINGS, place / DATA
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place}: is a file; wanted a folder, or the name of a new one")
    for path in (settings, data):
        if path.exists():
            raise CheckpointError(
                f"{path}: is there already, and nothing is overwritten; name another folder, or remove it"
            )
    out = "runs/mine" if place == Path() else (place / "run").as_posix()
    chosen = {"model": "smollm2", "data": data.as_posix(), "out": out, "prompts": ["How is the weather?"]}
    content = settings_file(chosen)
    write_file(data, STARTER.read_bytes())
    write_file(settings, content)
    say(f"{data}: ten conversations of a bicycle workshop, a line each; put your own in their place")
    say(f"{settings}: every setting with its meaning; those in force are model, data, out and prompts")
    say(f"next: {command('train', '--config', str(settings))}")
