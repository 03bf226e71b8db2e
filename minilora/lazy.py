"""Names of a package that are imported when they are asked for (PEP 562): ``import minilora`` takes milliseconds and needs no torch.

A package that uses it has a stub beside its ``__init__.py`` (``__init__.pyi``), from which mypy and editors know the same names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``(__getattr__, __dir__, __all__)`` of a package.

    Args:
        package: its dotted name.
        names: module to the public names that are taken from it. The package's own modules can be asked for too, without being listed.
    """
    module_of = {name: module for module, own in names.items() for name in own}

    def get(name: str) -> Any:
        if name in module_of:
            value = getattr(importlib.import_module(module_of[name]), name)
        elif name.isidentifier() and not name.startswith("_") and _is_module(f"{package}.{name}"):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        setattr(sys.modules[package], name, value)  # so that it is asked for once
        return value

    def names_there() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get, names_there, sorted(module_of)


def _is_module(name: str) -> bool:
    from importlib.util import find_spec  # which costs more to import than all of this

    return find_spec(name) is not None
