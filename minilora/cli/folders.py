"""Flags of the commands that write a folder of weights: where it goes, and in which dtype."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag, fields_of
from minilora.errors import ConfigError
from minilora.hf.job import DTYPE_NAMES, Job

__all__ = ["DTYPE", "check_dtype", "new_folder"]

DTYPE = Flag("dtype", str, "float32", fields_of(Job)["dtype"].about, DTYPE_NAMES)


def new_folder(what: str) -> Flag:
    """``--out`` for something new."""
    return Flag("out", str, None, f"folder for the {what}; must not exist yet, or be empty", required=True)


def check_dtype(arguments: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for an unknown ``--dtype``."""
    if arguments.dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype={arguments.dtype!r}: wanted one of {', '.join(DTYPE_NAMES)}")
