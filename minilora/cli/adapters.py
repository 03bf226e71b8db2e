"""What every command that loads an adapter can be told about it."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.flags import Flag, add_flags

__all__ = ["add_adapter_flags", "trust_of"]


def add_adapter_flags(parser: argparse.ArgumentParser, required: bool, named: bool = True) -> None:
    """``--adapter`` (``named``), and which folder it may be."""
    place = "adapter folder (PEFT's layout), such as the --out of minilora train"
    digest = "refuse any other adapter than the one of this SHA-256, 64 hexadecimal digits; save_adapter returns it"
    base = "load the adapter on another base model than it was trained on"
    flags = [
        Flag("adapter", str, None, place, required=required),
        Flag("expect_sha256", str, None, digest),
        Flag("allow_other_base", bool, False, base),
    ]
    add_flags(parser, "adapter", flags if named else flags[1:])


def trust_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, as the functions that load an adapter take them."""
    return {"expect_sha256": arguments.expect_sha256, "allow_other_base": arguments.allow_other_base}
