"""A reader's file graded in a process of its own: an endless loop, ``exit()`` or a crash in it becomes a sentence.

The process writes what it begins and what it finds, a line of JSON each, into a file; so what was found before it ended is kept, and it
is known where it was. What the reader prints goes where this process prints. Next file: ``learn/progress.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from minilora.files.fresh import environment
from minilora.learn.answer import WRONG, Grade
from minilora.learn.course import lesson

__all__ = ["LESSON", "MUTANT", "check", "serve"]

LESSON, MUTANT = "lesson", "mutant"
_END = {"end": ""}  # the last line of a process that has done all


def check(path: Path, kind: str, number: int, seconds: float) -> list[Grade]:
    """The grades of a reader's file: of a lesson, or the one of a mutant.

    Args:
        kind: LESSON or MUTANT. seconds: after so many the process is ended; what comes after the function that it was in is graded in
            another one.
    """
    names = lesson(number).functions if kind == LESSON else ["show"]
    found: list[Grade] = []
    first = 0
    while first < len(names):
        lines, ended = _process(path, kind, number, first, seconds)
        found += [Grade(**line) for line in lines if "state" in line]
        if not ended:
            break
        at = next((line["began"] for line in reversed(lines) if "began" in line), path.name)
        found.append(Grade(at, WRONG, ended))
        first = names.index(at) + 1 if at in names else len(names)
    return found


def _process(path: Path, kind: str, number: int, first: int, seconds: float) -> tuple[list[dict[str, str]], str]:
    """What a process said from function ``first`` on, and how it ended, if not as it should."""
    with tempfile.TemporaryDirectory() as place:
        told = Path(place) / "told"
        told.touch()
        words = [kind, str(number), str(first), str(path.absolute()), str(told)]
        try:
            code = subprocess.run(
                [sys.executable, "-c", "from minilora.learn.apart import serve; serve()", *words],
                env=environment(),
                stdin=subprocess.DEVNULL,
                timeout=seconds,
            ).returncode
            ended = f"it ends Python with code {code}; wanted a value"
        except subprocess.TimeoutExpired:
            ended = f"it has not ended after {seconds:g} seconds; is there a loop without an end?"
        lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return lines, "" if _END in lines else ended


def serve() -> None:
    """The other side: grade, and write down what was found."""
    kind, number, first, path, told = sys.argv[1:]
    with open(told, "a", encoding="utf-8") as out:

        def write(line: dict[str, str]) -> None:
            print(json.dumps(line), file=out, flush=True)

        def began(name: str) -> None:
            write({"began": name})

        if kind == MUTANT:
            from minilora.learn.judge import judge

            began("show")
            write(asdict(judge(Path(path), int(number))))
        else:
            from minilora.learn.grade import grades

            for grade in grades(Path(path), int(number), int(first), began):
                write(asdict(grade))
        write(_END)
