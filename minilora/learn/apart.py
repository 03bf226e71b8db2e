"""A reader's file graded in a process of its own: an endless loop, ``exit()`` or a crash in it becomes a sentence.

The process writes what it begins and what it finds, a line of JSON each, into a file; so what was found before it ended is kept, and it
is known where it was. What the reader prints goes where this process prints. Next file: ``learn/progress.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from minilora.learn.grade import WRONG, Grade, grades
from minilora.learn.judge import judge

__all__ = ["check", "serve"]

LESSON, MUTANT = "lesson", "mutant"


def check(path: Path, kind: str, number: int, seconds: float) -> list[Grade]:
    """The grades of a reader's file: of a lesson, or the one of a mutant.

    Args:
        kind: LESSON or MUTANT. seconds: after so many the process is ended, wherever it is.
    """
    with tempfile.TemporaryDirectory() as place:
        told = Path(place) / "told"
        told.touch()
        words = [sys.executable, "-c", "from minilora.learn.apart import serve; serve()"]
        package = str(Path(__file__).parents[2])  # where `import minilora` is found
        path_of = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            code = subprocess.run(
                [*words, kind, str(number), str(path.absolute()), str(told)],
                env=os.environ | {"PYTHONPATH": path_of},
                stdin=subprocess.DEVNULL,
                timeout=seconds,
            ).returncode
            ended = "" if code == 0 else f"it ends Python with code {code}; wanted a value"
        except subprocess.TimeoutExpired:
            ended = f"it has not ended after {seconds:g} seconds; is there a loop without an end?"
        lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = [Grade(**line) for line in lines if "state" in line]
    if ended:
        now = next((line["began"] for line in reversed(lines) if "began" in line), path.name)
        found.append(Grade(now, WRONG, ended))
    return found


def serve() -> None:
    """The other side: grade, and write down what was found."""
    kind, number, path, told = sys.argv[1:]
    with open(told, "a", encoding="utf-8") as out:

        def write(line: dict[str, str]) -> None:
            print(json.dumps(line), file=out, flush=True)

        def began(name: str) -> None:
            write({"began": name})

        if kind == MUTANT:
            began("show")
            write(asdict(judge(Path(path), int(number))))
        else:
            for grade in grades(Path(path), int(number), began):
                write(asdict(grade))
