"""Records of any source, one after the other: read, recognised and checked, and refused by file and line.

A record is one of ``{"messages": [{"role", "content"}, ...]}``, ``{"prompt", "completion"}`` or ``{"text"}``, whatever shape it had in its
file (``shapes/``) and whatever the file is (``sources/``). What else it says and what would change a run is used (``fields.py``) or refused
by name; notes that change nothing (``source``, ``id``) are passed over, and ``unused`` counts them. Next file: ``data/fields.py``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minilora.data.shapes.record import Line, Record
from minilora.data.shapes.understood import Reading, understood
from minilora.data.sources import lines
from minilora.data.sources.kinds import WANTED, look
from minilora.data.sources.names import named, several
from minilora.data.sources.part import Source
from minilora.errors import DataError
from minilora.files.read import refuse_path

__all__ = [
    "Reading",
    "Record",
    "Source",
    "look_at",
    "look_at_all",
    "read",
    "read_jsonl",
    "records_of",
    "shapes",
    "unused",
]

_PLAIN = Reading()


def look_at(
    entry: str | os.PathLike[str], say: Callable[[str], None] = lambda line: None, weighted: bool = True
) -> Source:
    """Read what an entry names once, without looking into its records.

    Args:
        entry: file, folder, or id of a data set, as ``sources/names.py`` takes it apart. weighted: whether a weight may stand in it.

    Raises:
        DataError: there is none, it is no data, or no example is in it. ConfigError: a weight that is none.
    """
    name = named(os.fspath(entry), weighted)
    return Source(name.what, look(name, say), name.weight)


def look_at_all(
    entries: str | Sequence[str], say: Callable[[str], None] = lambda line: None, weighted: bool = True
) -> list[Source]:
    """``look_at`` of one entry or several."""
    return [look_at(entry, say, weighted) for entry in several(entries)]


def records_of(source: Source, reading: Reading = _PLAIN) -> Iterator[Record]:
    """The records one after the other, each checked. Raises as ``read``; and ``DataError`` if a file is another one by now."""
    for part in source.parts:
        yield from _of_part(part.name, part.rows(), reading)


def read(entry: str | os.PathLike[str]) -> list[Record]:
    """All records of a file of any format, a folder, or a data set, every one checked. A value of null is as good as none.

    Raises:
        DataError: as ``look_at``; a record that cannot be read, has a key twice, is of no shape or of several that do not agree, or has a
            field that nothing would use; with path and line, and the byte of the line where there is one.
    """
    return list(records_of(look_at(entry, weighted=False)))


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a JSONL file. Raises ``DataError`` as ``read``."""
    source = Path(path)
    refuse_path(source, DataError)
    if not source.is_file():
        missing = "a folder, a pipe or a device, and no file" if source.exists() else "no such file"
        raise DataError(f"{source}: {missing}; {WANTED}")
    records: list[Record] = list(_of_part(str(source), lines.rows(source), _PLAIN))
    if not records:
        raise DataError(f"{source}: holds no example; wanted one JSON object a line")
    return records


def _of_part(name: str, rows: Iterable[tuple[int, Any]], reading: Reading) -> Iterator[Line]:
    for number, value in rows:
        where = f"{name}:{number}"
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: holds a {type(value).__name__}; wanted an object with 'messages', 'prompt' or 'text'"
            )
        try:
            line = understood(value, reading)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        line.where, line.line = where, number
        yield line


def unused(records: Iterable[Record]) -> Counter[str]:
    """Keys that nothing uses, each with the number of its records."""
    return Counter(key for record in records for key in getattr(record, "notes", ()))


def shapes(records: Iterable[Record]) -> Counter[str]:
    """The shapes that records had, each with their number."""
    return Counter(getattr(record, "shape", "") for record in records)
