"""CSV and TSV: a header with the names of the columns, and a row for each example. All cells are texts, an empty one is none.

Read by the csv module and not through pandas, which would make numbers, dates and missing values of answers such as ``007``, ``None`` or
``2024-01-31``. Next file: ``data/sources/texts.py``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from minilora.data.sources.part import Part, Rows
from minilora.data.sources.stream import LONGEST, Stream, again, counted, decoded
from minilora.errors import DataError

__all__ = ["look", "rows"]

_SIGNS = {"CSV": ",;|\t", "TSV": "\t"}  # what may stand between cells


def look(path: Path, kind: str) -> Part:
    """Read a file once, and all its rows."""
    count, size, found = counted(path, lambda stream: _rows(stream, kind))
    if not count:
        raise DataError(f"{path}: holds no example; wanted a header with the names of the columns, and rows under it")
    return Part(str(path), kind, size, found, count, lambda: rows(path, kind, found))


def rows(path: Path, kind: str, sha256: str) -> Rows:
    """The rows as objects, each with the line that it begins in."""
    return again(path, sha256, lambda stream: _rows(stream, kind))


def _rows(stream: Stream, kind: str) -> Rows:
    lines = _Lines(stream)
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    first = next(lines, "")
    sign = max(_SIGNS[kind], key=lambda sign: _outside_quotes(first).count(sign))
    header: list[str] = []
    table = csv.reader(lines.again(first), delimiter=sign, strict=True)
    while True:
        line = lines.number + (0 if lines.waiting else 1)
        try:
            cells = next(table, None)
        except csv.Error as error:
            way = (
                "close the quote; one inside a text is written twice"
                if "unexpected end" in str(error)
                else "mend the row"
            )
            raise DataError(f"{stream.path}:{line}: not {kind} ({error}); {way}") from None
        if cells is None:
            return
        if not header:
            header = _header(cells, f"{stream.path}:{line}")
        elif cells and any(cells):
            if len(cells) != len(header):
                raise DataError(
                    f"{stream.path}:{line}: has {len(cells)} cells, and the header {len(header)}; quote texts with {sign!r} or a line end"
                )
            yield line, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{where}: the column {twice!r} comes twice; wanted a header with a name for each column")
    return names


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


class _Lines(Iterator[str]):
    """The lines of a file as text; ``number`` is of the last one."""

    def __init__(self, stream: Stream) -> None:
        self._lines, self._path, self.number, self.waiting = stream.lines(), stream.path, 0, ""

    def again(self, line: str) -> _Lines:
        """The same, with this line once more in front."""
        self.waiting = line
        return self

    def __next__(self) -> str:
        if self.waiting:
            line, self.waiting = self.waiting, ""
            return line
        raw = next(self._lines)
        self.number += 1
        if len(raw) > LONGEST:
            raise DataError(
                f"{self._path}:{self.number}: is longer than {LONGEST:,} bytes; cut the example into shorter ones"
            )
        line = decoded(raw, self._path, self.number)
        if "\0" in line:
            raise DataError(
                f"{self._path}:{self.number}: holds a zero byte, so it is no text; save the table as CSV UTF-8"
            )
        return line
