"""``minilora compare``: runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.cli.flags import Flag, add_flags
from minilora.cli.say import say
from minilora.cli.trial import check_page

USAGE = "RUN RUN [RUN ...] [--html FILE]"
EXAMPLES = """\
  minilora compare runs/one runs/two
  minilora compare runs/one runs/two runs/three --html compare.html"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora compare`` takes."""
    parser.add_argument("run_folder", metavar="RUN", nargs="+", help="run folders, two or more (required)")
    html = Flag("html", str, None, "write all of it as a page, too, with the loss curves in one figure")
    add_flags(parser, "output", [html])


def run(arguments: argparse.Namespace) -> None:
    """Read, print, and write the page if asked."""
    check_page(arguments.html)
    from minilora.job.compare import compare

    found = compare(arguments.run_folder)
    say("\n\n".join(filter(None, shown(found))))
    if arguments.html:
        _write(arguments.html, found)


def shown(found: Any) -> list[str]:
    """Results, settings that differ, and answers, each as a text."""
    settings = _table(found.names, found.settings) if found.settings else ""
    return [
        _table(found.names, found.results),
        f"settings that differ\n{settings}" if settings else "no setting differs",
        "\n\n".join(_answer(prompt, said) for prompt, said in found.answers.items()),
        "\n".join(found.notes),
    ]


def _table(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    from minilora.report.tables import Row, as_text

    return as_text(names, [Row(name, [_short(text) for text in texts]) for name, texts in rows.items()], bars=False)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:37]}..."


def _answer(prompt: str, said: Mapping[str, str]) -> str:
    width = max(map(len, said)) + 1
    lines = [f"  {f'{who}:'.ljust(width)} {' '.join(text.split())}" for who, text in said.items()]
    return "\n".join([f"> {prompt}", *lines])


def _write(file: str, found: Any) -> None:
    from pathlib import Path

    from minilora.files.write import write_file
    from minilora.report.runs_page import runs_page

    place = Path(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    records = {run.name: run.records for run in found.runs}
    write_file(place, runs_page(records, found.results, found.settings, found.answers, found.notes))
    say(f"\n{place}: open it in a browser")
