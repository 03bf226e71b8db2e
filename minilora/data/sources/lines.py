"""JSONL: a JSON object a line. Next file: ``data/sources/array.py``."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilora.data.sources.part import Part, Rows
from minilora.data.sources.stream import LONGEST, changed, unread
from minilora.errors import DataError
from minilora.files.parse import once

__all__ = ["look", "parsed", "rows"]


def look(path: Path) -> Part:
    """Read a file once, without looking into its lines."""
    digest, size, count = hashlib.sha256(), 0, 0
    for number, raw in _lines(path):
        digest.update(raw)
        size += len(raw)
        count += bool(_text(raw, number).strip())
    if not count:
        raise DataError(f"{path}: holds no example; wanted one JSON object a line")
    found = digest.hexdigest()
    return Part(str(path), "JSONL", size, found, count, lambda: rows(path, found))


def rows(path: Path, sha256: str = "") -> Rows:
    """The values of all lines that are not blank. ``sha256``: the hash that the file has, "" if it was not looked at."""
    digest = hashlib.sha256()
    for number, raw in _lines(path):
        digest.update(raw)
        if (text := _text(raw, number)).strip():
            yield number, parsed(text, f"{path}:{number}")
    if sha256 and digest.hexdigest() != sha256:
        raise changed(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """``(number from 1, bytes)`` of each line; one that is too long comes in pieces, the first of which is too long as well."""
    try:
        with path.open("rb") as lines:
            yield from enumerate(iter(lambda: lines.readline(LONGEST + 1), b""), 1)
    except OSError as error:
        raise unread(path, error) from None


def _text(raw: bytes, number: int) -> bytes:
    return raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def parsed(raw: bytes, where: str) -> Any:
    """A line's value. Raises ``DataError`` with the byte, where there is one."""
    if len(raw) > LONGEST:
        raise DataError(
            f"{where}: is longer than {LONGEST:,} bytes; write one example a line, and cut it into shorter ones"
        )
    try:
        text = raw.decode("utf-8").rstrip("\r\n")  # so that what is missing at the end is missing in this line
        return json.loads(text, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}:{error.start + 1}: byte {error.start + 1} is not UTF-8; convert the file (iconv -t utf-8)"
        ) from None
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode()) + 1
        raise DataError(
            f"{where}:{byte}: not JSON at column {error.colno} ({error.msg}); write one object a line"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a key twice, a number of thousands of digits, brackets thousands deep
        raise DataError(f"{where}: cannot be read as JSON ({error}); write one plain object a line") from None
