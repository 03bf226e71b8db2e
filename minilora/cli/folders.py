"""Flags of the commands that write a folder of weights: where it goes, and in which dtype, which is no machine's to choose."""

from __future__ import annotations

import argparse
from pathlib import Path

from minilora.cli.flags import Flag
from minilora.errors import ConfigError
from minilora.hf.places import DTYPE_NAMES

__all__ = ["DTYPE", "check_dtype", "new_folder", "refuse_file"]

DTYPE = Flag("dtype", str, "float32", "number format of the weights that are not packed", DTYPE_NAMES)


def new_folder(what: str) -> Flag:
    """``--out`` for something new."""
    return Flag("out", str, None, f"folder for the {what}; must not exist yet, or be empty", required=True)


def check_dtype(arguments: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for an unknown ``--dtype``."""
    if arguments.dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype={arguments.dtype!r}: wanted one of {', '.join(DTYPE_NAMES)}")


def refuse_file(out: str) -> None:
    """Raise ``ConfigError`` for an ``--out`` that is no name of a new GGUF file."""
    if Path(out).suffix != ".gguf":
        raise ConfigError(f"--out={out!r}: wanted the name of a new file that ends in .gguf")
    if Path(out).exists():
        raise ConfigError(f"--out={out!r}: exists; wanted the name of a new file")
