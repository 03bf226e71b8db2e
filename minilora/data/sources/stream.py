"""The bytes of a file, read once and hashed on the way; and its text, refused by line and byte where it is not UTF-8.

Next file: ``data/sources/lines.py``.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from minilora.data.sources.part import Rows
from minilora.errors import DataError

__all__ = ["LONGEST", "Stream", "again", "changed", "counted", "decoded", "hashed", "no_utf8", "unread"]

LONGEST = 16_000_000  # bytes of one example; some four million tokens, more than any context
_CHUNK = 1 << 20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Stream:
    """An open file. ``digest`` is of what was read so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.digest, self.size = path, hashlib.sha256(), 0
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise unread(path, error) from None

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, size: int = _CHUNK) -> bytes:
        """The next bytes, b"" at the end."""
        return self._taken(self._file.read, size)

    def lines(self) -> Iterator[bytes]:
        """Line after line; one that is too long comes in pieces, the first of which is too long as well."""
        while line := self._taken(self._file.readline, LONGEST + 1):
            yield line

    def _taken(self, read: object, size: int) -> bytes:
        try:
            content: bytes = read(size)  # type: ignore[operator]
        except OSError as error:
            raise unread(self.path, error) from None
        self.digest.update(content)
        self.size += len(content)
        return content

    def rest(self) -> str:
        """The hash of the whole file."""
        while self.read():
            pass
        return self.digest.hexdigest()


def counted(path: Path, read: Callable[[Stream], Rows]) -> tuple[int, int, str]:
    """How many rows ``read`` finds in a file, its size and its hash."""
    with Stream(path) as stream:
        count = sum(1 for _ in read(stream))
        digest = stream.rest()
        return count, stream.size, digest


def again(path: Path, sha256: str, read: Callable[[Stream], Rows]) -> Rows:
    """The rows of a file that was counted. Raises ``DataError`` at its end where it is another one by now."""
    with Stream(path) as stream:
        yield from read(stream)
        if stream.rest() != sha256:
            raise changed(path)


def hashed(path: Path) -> tuple[int, str]:
    """Size and hash of a file."""
    with Stream(path) as stream:
        digest = stream.rest()
        return stream.size, digest


def decoded(raw: bytes, path: object, line: int) -> str:
    """A piece of a file as text; ``line`` is where it begins. Raises ``DataError`` with line and byte of what is not UTF-8."""
    if line == 1:
        if raw.startswith(_UTF16):
            raise DataError(f"{path}:1: is UTF-16; convert the file (iconv -f utf-16 -t utf-8)")
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise no_utf8(path, line, raw[: error.start]) from None


def no_utf8(path: object, line: int, before: bytes) -> DataError:
    """The error of a byte that is no UTF-8, behind ``before``, which begins in this line."""
    line, byte = line + before.count(b"\n"), len(before) - before.rfind(b"\n")
    return DataError(f"{path}:{line}:{byte}: byte {byte} is not UTF-8; convert the file (iconv -t utf-8)")


def unread(path: object, error: OSError) -> DataError:
    """The error of a file that the system does not give."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path and its rights")


def changed(path: object) -> DataError:
    """The error of a file that is another one by now."""
    return DataError(f"{path}: changed while it was read; start again when nothing writes to it")
