"""Broken code as homework: a function of minilora with one change, of which the reader finds an input that shows it.

The change is a replacement in the function's own source, which must match it once; so code that moves on breaks a test, and no reader.
Next file: ``learn/judge.py``.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minilora.errors import StateError

__all__ = ["Mutant"]


@dataclass(frozen=True)
class Mutant:
    """One change of one function.

    Args:
        place: ``module:function`` below minilora, or ``module:Class.method``; of a property its getter.
        about: what the function is for, a sentence.
        old, new: the text that is replaced, and what stands there instead.
        witness: the source of a ``show()`` whose arguments show the change. plain: of one whose arguments do not.
        makes: lines that make an object of minilora that it takes, where it takes one; they are in the reader's file as a comment.
    """

    place: str
    about: str
    old: str
    new: str
    witness: str
    plain: str
    makes: str = ""

    @property
    def name(self) -> str:
        """The function's dotted name without its module: ``pack``, ``LoRALinear.delta_weight``."""
        return self.place.partition(":")[2]

    @property
    def file(self) -> str:
        """The file of the package that the original stands in."""
        return f"minilora/{self.place.partition(':')[0].replace('.', '/')}.py"

    def original(self) -> Callable[..., Any]:
        """The function as it is."""
        found: Any = self._module()
        for part in self.name.split("."):
            found = inspect.getattr_static(found, part)
        return _called(found)

    def source(self) -> str:
        """The source with the change. Raises ``StateError`` where the text to replace is not there exactly once."""
        text = textwrap.dedent(inspect.getsource(self.original()))
        if text.count(self.old) != 1:
            raise StateError(
                f"{self.place}: {text.count(self.old)} places say {self.old!r}; wanted one, the code has changed since this mutant was made"
            )
        return text.replace(self.old, self.new)

    def broken(self) -> Callable[..., Any]:
        """The function with the change; what it calls is the original. Raises as ``source``."""
        names = dict(vars(self._module()))
        exec(compile(self.source(), f"<mutant of {self.name}>", "exec"), names)  # annotations stay text, as here
        return _called(names[self.name.rpartition(".")[2]])

    def exercise(self, number: int) -> str:
        """The text of the reader's file."""
        code = _comment(self.source())
        makes = f"# How to make what it takes:\n{_comment(self.makes)}\n\n\n" if self.makes else ""
        takes = ", ".join(inspect.signature(self.original()).parameters)
        return (
            f'"""Mutant {number}. {self.about}\n\n'
            f"Below is ``{self.name}`` of {self.file} with one change. Write ``show``: it returns arguments that the original\n"
            "takes, and for which the two do not do the same (another value, another shape, or an error of the mutant).\n"
            f'``minilora learn check mutant {number}`` tries them.\n"""\n\n'
            "import torch\n\n\n"
            f"{code}\n\n\n"
            f"{makes}"
            "def show():\n"
            f'    """Return a tuple: ({takes}{"," * (", " not in takes)})."""\n'
            "    raise NotImplementedError\n"
        )

    def _module(self) -> Any:
        return importlib.import_module(f"minilora.{self.place.partition(':')[0]}")


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _called(found: Any) -> Callable[..., Any]:
    """The plain function of a property or a decorated one."""
    function: Any = found.fget if isinstance(found, property) else found
    return inspect.unwrap(function)
