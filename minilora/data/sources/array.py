"""JSON: one list of objects, read an object at a time, so that a file of any size takes the memory of one.

Next file: ``data/sources/table.py``.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from minilora.data.sources.part import Part, Rows
from minilora.data.sources.stream import LONGEST, Stream, again, counted, no_utf8
from minilora.errors import DataError
from minilora.files.parse import once

__all__ = ["look", "rows"]

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=once)


def look(path: Path) -> Part:
    """Read a file once, and parse it."""
    count, size, found = counted(path, _elements)
    if not count:
        raise DataError(f"{path}: holds an empty list; wanted [{{...}}, ...], an object for each example")
    return Part(str(path), "JSON", size, found, count, lambda: rows(path, found))


def rows(path: Path, sha256: str) -> Rows:
    """The elements of the list, each with the line that it begins in."""
    return again(path, sha256, _elements)


def _elements(stream: Stream) -> Rows:
    text = _Text(stream)
    text.skip("[")
    if text.next() == "]":
        text.skip("]")
    else:
        while True:
            text.next()
            yield text.line, text.value()
            if text.next() != ",":
                break
            text.skip(",")
        text.skip("]")
    if text.next():
        raise text.wrong(f"{text.next()!r} after the list")


class _Text:
    """The text of a file from where it is read on: ``text[at:]``, of which ``line`` is the line."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read on; False at the end of the file. What was read comes twice as large each time, so that time grows with the size."""
        if self.ended:
            return False
        self.text, self.at = self.text[self.at :], 0
        raw = self.stream.read(max(1 << 16, len(self.text)))
        self.ended = not raw
        try:
            self.text += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            raise no_utf8(self.stream.path, self.line, self.text.encode() + error.object[: error.start]) from None
        return True

    def next(self) -> str:
        """The next sign that is no space, "" at the end."""
        while True:
            end = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text):
                return self.text[end]
            if not self.more():
                return ""

    def skip(self, sign: str) -> None:
        """Go past a sign that must come next."""
        found = self.next()
        if found != sign:
            wanted = "a comma or the end of the list" if sign == "]" else repr(sign)
            raise self.wrong(f"{found!r} where {wanted} was wanted" if found else "the file ends inside the list")
        self.at += 1

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.more():  # a number at the end of what was read may go on
                    break
            except json.JSONDecodeError as error:
                # What is wrong far before the end of what was read is not wrong because the rest is missing.
                if (error.pos < len(self.text) - 100 and "Unterminated" not in error.msg) or not self._longer():
                    self.line += self.text.count("\n", self.at, error.pos)
                    raise self.wrong(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.stream.path}:{self.line}: cannot be read as JSON ({error}); wanted plain objects in a list"
                ) from None
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def _longer(self) -> bool:
        if len(self.text) - self.at > LONGEST:
            raise DataError(
                f"{self.stream.path}:{self.line}: an example is longer than {LONGEST:,} letters; cut it into shorter ones"
            )
        return self.more()

    def wrong(self, what: str) -> DataError:
        return DataError(f"{self.stream.path}:{self.line}: not JSON ({what}); wanted one list, [{{...}}, ...]")
