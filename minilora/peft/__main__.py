"""``python -m minilora.peft script.py [arguments]``: runs a script whose ``import peft`` is answered by minilora.

Everything that the script imports gets the same answer: TRL, transformers, accelerate. Whether PEFT is installed does not matter.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from minilora.peft import __version__

__all__ = ["answer_for_peft", "main"]


class Answers(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    """Finds ``minilora.peft`` where ``peft`` is looked for, its modules too, and the version whose names these are."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of peft, if minilora has it."""
        if fullname.partition(".")[0] != "peft" or importlib.util.find_spec(_own(fullname)) is None:
            return None
        found = importlib.util.find_spec(_own(fullname))
        is_package = found is not None and found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin="minilora", is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """minilora's module itself, so that both names mean the same classes."""
        module = importlib.import_module(_own(spec.name))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; its own name is put back."""
        module.__spec__ = self._spec

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        """What ``importlib.metadata.version("peft")`` asks."""
        if getattr(context, "name", None) == "peft":
            yield Named()


class Named(importlib.metadata.Distribution):
    """The metadata of a package called peft."""

    def read_text(self, filename: str) -> str | None:
        """``METADATA``, and nothing else."""
        return f"Metadata-Version: 2.1\nName: peft\nVersion: {__version__}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        """Where minilora lies."""
        return Path(__file__).parent / path


def _own(name: str) -> str:
    return f"minilora.{name}"


def answer_for_peft() -> None:
    """From now on ``import peft`` means ``minilora.peft`` in this process. Raises ``ImportError`` if peft has been imported already."""
    if "peft" in sys.modules and not sys.modules["peft"].__name__.startswith("minilora"):
        raise ImportError(
            "peft has been imported already; call answer_for_peft() before, or run python -m minilora.peft script.py"
        )
    if not any(isinstance(finder, Answers) for finder in sys.meta_path):
        sys.meta_path.insert(0, Answers())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script. Returns 2 where none is named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].startswith("-"):
        print("usage: python -m minilora.peft script.py [arguments]", file=sys.stderr)
        return 2
    if not Path(given[0]).is_file():
        print(f"{given[0]}: no such script", file=sys.stderr)
        return 2
    answer_for_peft()
    sys.argv = given
    sys.path.insert(0, str(Path(given[0]).resolve().parent))
    runpy.run_path(given[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    # The finder must be the module's of the one name, or a second import would make another.
    from minilora.peft.__main__ import main as run

    raise SystemExit(run())
