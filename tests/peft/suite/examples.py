"""Which of PEFT's examples import nothing that minilora lacks: ``python tests/peft/suite/examples.py CHECKOUT``.

A name of another of PEFT's methods is there and refuses by name when it is called; such examples are counted apart.
"""

from __future__ import annotations

import argparse
import ast
import collections
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from minilora.peft import others
from minilora.peft.__main__ import answer_for_peft


def code_of(path: Path) -> str:
    """A script, or the cells of a notebook without the lines that speak to the notebook."""
    if path.suffix == ".py":
        return path.read_text()
    cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell) for cell in cells).splitlines()
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def imported(code: str) -> Iterator[tuple[str, str]]:
    """``(module, name)`` of what comes from peft; the name is "" where a module is imported whole."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "peft")


def verdict(path: Path) -> tuple[str, str]:
    """What there is to say of an example, and the name that decided it."""
    try:
        names = sorted(set(imported(code_of(path))))
    except SyntaxError:
        return "not Python as it stands", ""
    if not names:
        return "imports nothing of PEFT", ""
    for module, name in names:
        try:
            found = importlib.import_module(module)
            if name and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
        except ImportError:
            return "lacks", f"{module}.{name}"
    other = [name for _, name in names if name in others.OTHERS]
    return ("another method", other[0]) if other else ("all names there", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    folder = parser.parse_args().checkout / "examples"
    if not folder.is_dir():
        parser.error(f"{folder}: no such folder")
    answer_for_peft()
    counts: collections.Counter[str] = collections.Counter()
    for path in sorted(each for each in folder.rglob("*") if each.suffix in (".py", ".ipynb")):
        kind, name = verdict(path)
        counts[kind] += 1
        if name:
            print(f"{path.relative_to(folder)}: {kind}: {name}")
    print(", ".join(f"{kind}: {count}" for kind, count in counts.most_common()), file=sys.stderr)


if __name__ == "__main__":
    main()
