"""The field's claims, a file each (``lab/ground/claim.py`` says what is in one)."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from minilora.errors import ConfigError, nearest

__all__ = ["claim", "claims"]


def claims() -> dict[str, ModuleType]:
    """The files of this folder by the names of their claims, in the order of their files."""
    found = {}
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda entry: entry.name):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        found[module.CLAIM.name] = module
    return found


def claim(name: str) -> ModuleType:
    """The file of one claim. Raises ``ConfigError`` with the closest names."""
    known = claims()
    if name not in known:
        raise ConfigError(
            f"claim {name!r} is not known; the closest are {nearest(name, known)}; minilora lab lists them"
        )
    return known[name]
