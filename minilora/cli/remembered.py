"""What a command need not be told, because the run that its --adapter names remembers it (``job/record.py``); a flag that is given wins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minilora.cli.flags import Flag
from minilora.cli.say import say
from minilora.errors import ConfigError

if TYPE_CHECKING:
    from minilora.job.record import Record

__all__ = ["BASE", "as_trained", "recall", "tell_differences", "tell_system"]

BASE = Flag(
    "model", str, None, 'hub id, local folder, GGUF file, or "smollm2"', otherwise="as the run of --adapter was trained"
)


def as_trained(flag: Flag, otherwise: object) -> Flag:
    """The flag for a command that takes from a run what is not given, and ``otherwise`` where there is no run."""
    words = f"as the run of --adapter was trained, else {otherwise}"
    return Flag(flag.name, flag.kind, None, flag.about, flag.choices, otherwise=words)


def recall(arguments: argparse.Namespace, **otherwise: Any) -> Record | None:
    """Fill in what was not given: from the record of the run that ``--adapter`` is in, else from ``otherwise``.

    Raises:
        ConfigError: there is no model, neither given nor remembered. CheckpointError: as ``read_record``.
    """
    record = None
    if arguments.adapter:
        from minilora.job.record import read_record

        record = read_record(arguments.adapter)
    known: dict[str, Any] = {}
    if record is not None:
        known = {name: getattr(record, name) for name in ("model", "dtype", "attention", "system")}
        known["max_new_tokens"] = record.settings.get("max_new_tokens")
    for name in ("model", *otherwise):
        if getattr(arguments, name) is None:
            value = known.get(name)
            setattr(arguments, name, otherwise.get(name) if value is None else value)
            if name == "model":
                arguments.named_by = arguments.adapter
    if arguments.model is None:
        if arguments.adapter and not os.path.exists(arguments.adapter) and arguments.adapter.count("/") != 1:
            raise ConfigError(
                f"--adapter={arguments.adapter!r}: no such folder; wanted a run, or the folder of an adapter"
            )
        where = (
            f"{arguments.adapter} holds no job.json of a run that remembers it" if arguments.adapter else "no --adapter"
        )
        raise ConfigError(f"--model: missing, and {where}; wanted a hub id, a local folder, a GGUF file, or smollm2")
    return record


def tell_system(record: Record) -> None:
    """Say what no folder for another program holds: the system turn of the run."""
    if record.system:
        say(f"the run had the system turn {record.system!r}: ask with it, for the new folder does not have it")


def tell_differences(adapter: str, found: Sequence[str]) -> None:
    """Say in one line on standard error where the base at hand is not the one that an adapter was trained on."""
    if found:
        say(f"{adapter}: {'; '.join(found)}; its answers can be others than those of the run", error=True)
