"""Flags of the commands that write a folder of weights: where it goes, and in which dtype, which is no machine's to choose."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag
from minilora.errors import ConfigError
from minilora.hf.places import DTYPE_NAMES

__all__ = ["DTYPE", "check_dtype", "new_folder"]

DTYPE = Flag("dtype", str, "float32", "number format of the weights that are not packed", DTYPE_NAMES)


def new_folder(what: str) -> Flag:
    """``--out`` for something new."""
    return Flag("out", str, None, f"folder for the {what}; must not exist yet, or be empty", required=True)


def check_dtype(arguments: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for an unknown ``--dtype``."""
    if arguments.dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype={arguments.dtype!r}: wanted one of {', '.join(DTYPE_NAMES)}")
