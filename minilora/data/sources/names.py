"""What an entry of ``--data`` names: a file or folder, or a data set of the Hub; and how often its examples count.

``a.jsonl``, ``a.jsonl:0.5``, ``org/name``, ``org/name:test``, ``org/name/config:train:2``. A path that is there is taken as it is written,
whatever signs it has. Next file: ``data/sources/part.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from minilora.errors import ConfigError

__all__ = ["SUFFIXES", "Named", "named", "several"]

MOST = 1000.0  # times that a file may count
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(inf|nan)", re.I)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Suffixes of files with data: a name that ends in one is never taken for an id of the Hub.
SUFFIXES = {
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet", ".pq", ".arrow", ".feather", ".ipc", ".txt"),
    *(".text", ".md", ".markdown", ".rst", ".gz", ".zip", ".zst", ".xz", ".bz2", ".tar", ".xlsx", ".xls", ".ods", ".pdf"),
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """One entry, taken apart.

    Attributes:
        what: path, or id of a data set. weight: how often its examples count, relative to their number.
        hub: whether it is an id. config, split: of a data set, "" if none is named.
    """

    what: str
    weight: float = 1.0
    hub: bool = False
    config: str = ""
    split: str = ""


def several(data: str | Sequence[str]) -> tuple[str, ...]:
    """One entry or several, as several."""
    return (data,) if isinstance(data, str) else tuple(data)


def named(entry: str, weighted: bool = True) -> Named:
    """An entry taken apart.

    Args:
        weighted: whether a weight may stand in it.

    Raises:
        ConfigError: a weight that is none, or that may not be there.
    """
    if _is_there(entry):
        return Named(entry)
    what, weight = _without_weight(entry)
    if weight is not None and not weighted:
        raise ConfigError(f"{entry}: a weight counts for training alone; leave out :{entry.rpartition(':')[2]}")
    if _is_there(what):
        return Named(what, weight or 1.0)
    name, _, split = what.partition(":")
    if _is_id(name):
        owner, short, *config = name.split("/")
        return Named(f"{owner}/{short}", weight or 1.0, True, "".join(config), split)
    if split and _is_there(name := what.rpartition(":")[0]):
        found = what.rpartition(":")[2][:40]
        raise ConfigError(f"{entry}: {found!r} is no weight; wanted a number after the file, as in {name}:0.5")
    return Named(what, weight or 1.0)


def _without_weight(entry: str) -> tuple[str, float | None]:
    head, _, tail = entry.rpartition(":")
    if not head or not _NUMBER.fullmatch(tail):
        return entry, None
    weight = float(tail)
    if not 0 < weight <= MOST:
        raise ConfigError(
            f"{entry}: weight {tail}; wanted a number above 0 and up to {MOST:g}: 0.5 takes half of the examples, 2 takes each twice"
        )
    return head, weight


def _is_there(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in it
        return False


def _is_id(name: str) -> bool:
    return bool(_ID.fullmatch(name)) and os.path.splitext(name)[1].lower() not in SUFFIXES
