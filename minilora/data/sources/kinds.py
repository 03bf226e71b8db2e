"""Which reader takes an entry: by what is there, its first bytes, and then its name. Next file: ``data/sources/stream.py``."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from minilora.data.sources import array, arrow, hub, lines, table, texts
from minilora.data.sources.foreign import FIRST, foreign
from minilora.data.sources.names import Named
from minilora.data.sources.part import Part
from minilora.data.sources.stream import unread
from minilora.errors import DataError
from minilora.files.read import refuse_path

__all__ = ["WANTED", "look"]

WANTED = "wanted JSONL with 'messages', 'prompt' and 'completion', or 'text' in every line, or JSON, CSV, Parquet, Arrow or text files"
_ARROW = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
_TABLES = {".csv": "CSV", ".tsv": "TSV", ".tab": "TSV"}
_COLUMNS = (".parquet", ".pq", ".arrow", ".feather", ".ipc")


def look(name: Named, say: Callable[[str], None] = lambda line: None) -> list[Part]:
    """The parts of what is named, each read once. Raises ``DataError`` for what is not there or holds no example."""
    if name.hub:
        return [hub.look(name, say)]
    path = Path(name.what)
    refuse_path(path, DataError)
    if path.is_dir():
        if arrow.saved(path):
            return [arrow.saved_part(path, name.what)]
        found = [part for file in texts.files(path, say) if (part := texts.look(file))]
        if not found:
            raise DataError(f"{path}: all text files in this folder are blank; wanted text in them")
        return found
    if not path.is_file():
        missing = "a pipe or a device, and no file" if path.exists() else "no such file or folder"
        near = get_close_matches(path.name, _names_beside(path), 1)
        meant = f"{near[0]} lies there, is it meant?" if near else WANTED
        raise DataError(f"{path}: {missing}; {meant}")
    return [_look(path)]


def _names_beside(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path.parent))
    except OSError:
        return []


def _look(path: Path) -> Part:
    first, suffix = _first(path), path.suffix.lower()
    if suffix in texts.SUFFIXES and _is_text(first):
        part = texts.look(path)
        if part is None:
            raise DataError(f"{path}: is blank; wanted text in it")
        return part
    if other := foreign(first):
        raise DataError(f"{path}: is {other[0]}; {other[1]}")
    if first.startswith(_ARROW):
        return arrow.look(path)
    if suffix in _COLUMNS and first:
        raise DataError(
            f"{path}: is no {'Parquet' if suffix in ('.parquet', '.pq') else 'Arrow'}, though its name says so; write it again"
        )
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}:1: is UTF-16; convert the file (iconv -f utf-16 -t utf-8)")
    if suffix in _TABLES:
        return table.look(path, _TABLES[suffix])
    begin, line, _ = first.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if suffix == ".json" and line and begin.startswith(b"{") and not begin.rstrip().endswith(b"}"):
        raise DataError(
            f"{path}:1: is one object over several lines; wanted a list of objects, [{{...}}, ...], or an object a line"
        )
    return array.look(path) if begin.startswith(b"[") else lines.look(path)


def _first(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FIRST)
    except OSError as error:
        raise unread(path, error) from None


def _is_text(first: bytes) -> bool:
    """Whether it begins as a text does, which may begin with a word that is the sign of another format; the last letter may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(first)
    except UnicodeDecodeError:
        return not foreign(first)
    return b"\0" not in first or not foreign(first)
