"""``minilora doctor``: what is wrong with an adapter, whoever made it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from minilora.cli.flags import Flag, add_flags
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say, say_styled

if TYPE_CHECKING:
    from minilora.doctor.examine import Examined
    from minilora.doctor.finding import Finding

USAGE = "FOLDER [--model NAME] [--json]"
EXAMPLES = """\
  minilora doctor runs/mine
  minilora doctor downloads/lora --model HuggingFaceTB/SmolLM2-135M-Instruct
  minilora doctor downloads/adapters.safetensors --json"""

_WIDTH = 10  # of the names of facts
_STYLES = {"fault": "bold red", "warning": "yellow", "note": ""}


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora doctor`` takes."""
    add_plugin_flag(parser)
    what = (
        "adapter folder of any program (PEFT, unsloth, axolotl, mlx-lm, minilora), or one file of an adapter (required)"
    )
    parser.add_argument("folder", help=what)
    base = (
        "base model to compare paths and shapes with, by its config alone: hub id, local folder or GGUF file; without it "
        "the one that the adapter names, if it is on this disk"
    )
    model = Flag("model", str, None, base)
    add_flags(parser, "model", [model])
    add_flags(parser, "output", [Flag("json", bool, False, "print all of it as JSON, for a program to read")])


def run(arguments: argparse.Namespace) -> int:
    """Look and print; the exit code is 1 where there is a fault."""
    from minilora.doctor.examine import examine
    from minilora.training.progress import Progress

    template, more = _remembered(arguments.folder)
    with Progress(0, sys.stderr):
        found = examine(arguments.folder, arguments.model, template, more)
    if arguments.json:
        say(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        _show(found)
    return 0 if found.healthy else 1


def _remembered(folder: str) -> tuple[str, list[Finding]]:
    """The template's digest that the run in the folder remembers, "" for none; a record that is damaged is a finding."""
    from minilora.doctor.finding import WARNING, Finding
    from minilora.errors import CheckpointError
    from minilora.job.record import read_record

    try:
        record = read_record(folder)
    except CheckpointError as error:
        what, _, way = str(error).rpartition("; ")
        return "", [Finding(WARNING, "record", what, way)]
    return (record.template if record is not None else ""), []


def _show(found: Examined) -> None:
    """The facts, then the findings, the worst first, then how many there are."""
    say(
        "\n".join(
            [f"{found.folder}: {found.kind}", *(f"  {name.ljust(_WIDTH)}{text}" for name, text in found.facts.items())]
        )
    )
    if found.findings:
        say("")
    for finding in found.findings:
        say_styled([(f"{finding.severity}: ", _STYLES[finding.severity]), (f"{finding.said}; {finding.way}", "")])
    counts = [f"{count or 'no'} {severity}{'s' * (count != 1)}" for severity, count in found.counts.items()]
    say(f"\n{', '.join(counts)}")
