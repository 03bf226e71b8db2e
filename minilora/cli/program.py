"""How this program is called, as whoever called it can type it again: for the commands that a command proposes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["command", "program"]


def program() -> str:
    """``minilora`` where the shell finds it by that name; else its path as it was called, or ``python -m minilora``."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        python = sys.executable or "python"
        return f"{_typed(python, Path(python).name)} -m minilora"
    return _typed(sys.argv[0], "minilora") if called.stem == "minilora" else "minilora"


def command(*words: str) -> str:
    """A line for a shell: the program and these words, each quoted where it must be."""
    return f"{program()} {shlex.join(words)}"


def _typed(path: str, name: str) -> str:
    """The name alone if a shell would run this very file by it; else the shortest path to it from here."""
    found = shutil.which(name)
    if found and os.path.abspath(found) == os.path.abspath(path):
        return name
    if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()):
        path = os.path.relpath(path)
    return shlex.quote(path)
