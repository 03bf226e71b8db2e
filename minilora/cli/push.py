"""``minilora push``: a run, or any adapter folder, with its model card onto the Hugging Face Hub."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag, add_flags
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say

USAGE = "RUN REPO [--private]"
EXAMPLES = """\
  minilora push runs/mine me/mine
  minilora push runs/mine mine --private"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora push`` takes."""
    add_plugin_flag(parser)
    parser.add_argument("folder", metavar="RUN", help="a run, or the folder of an adapter (required)")
    parser.add_argument(
        "repo", metavar="REPO", help="repository on the Hub: OWNER/NAME, or NAME of your own (required)"
    )
    hidden = "make the repository private, if it is not there yet"
    add_flags(parser, "output", [Flag("private", bool, False, hidden)])


def run(arguments: argparse.Namespace) -> None:
    """Check who is signed in, upload, and say where it is."""
    from minilora.job.push import check_upload, push_run

    check_upload(arguments.repo)
    say(f"{arguments.folder}: now at {push_run(arguments.folder, arguments.repo, arguments.private or None)}")
