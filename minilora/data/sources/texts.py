"""Plain text: a file, or a folder of files, each an example of the form ``text``. Next file: ``data/sources/arrow.py``.

A file of more than ``BLOCK`` bytes is read as several examples, parted at an empty line where there is one, else at the end of a line: so
a book has something to hold out, and takes the memory of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minilora.data.sources.part import Part, Rows
from minilora.data.sources.stream import LONGEST, Stream, again, counted, decoded
from minilora.errors import DataError

__all__ = ["BLOCK", "SUFFIXES", "files", "look", "rows"]

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
BLOCK = 64_000  # bytes


def look(path: Path) -> Part | None:
    """Read a file once; None if it is blank."""
    count, size, found = counted(path, _blocks)
    return Part(str(path), "text", size, found, count, lambda: rows(path, found)) if count else None


def rows(path: Path, sha256: str) -> Rows:
    """The blocks of a file as ``{"text"}``, each with the line that it begins in."""
    return again(path, sha256, _blocks)


def _blocks(stream: Stream) -> Rows:
    lines: list[bytes] = []
    begin, size = 1, 0

    def block() -> tuple[int, dict[str, str]] | None:
        text = decoded(b"".join(lines), stream.path, begin)
        if "\0" in text:
            raise DataError(f"{stream.path}: holds a zero byte, so it is no text; take it out of the data")
        return (begin, {"text": text}) if text.strip() else None

    for number, raw in enumerate(stream.lines(), 1):
        if len(raw) > LONGEST:
            raise DataError(f"{stream.path}:{number}: is longer than {LONGEST:,} bytes; put line ends into it")
        # Over the size a block ends before an empty line; at twice the size before any line.
        if lines and ((size > BLOCK and not raw.strip()) or size + len(raw) > 2 * BLOCK):
            if found := block():
                yield found
            lines, begin, size = [], number, 0
        lines.append(raw)
        size += len(raw)
    if found := block():
        yield found


def files(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """The files of text in a folder and those under it, by name; what is passed over is said.

    Raises:
        DataError: there is none, or there are files of data beside them.
    """
    try:
        every = sorted(path for path in folder.rglob("*") if not _hidden(path.relative_to(folder)) and path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check the path and its rights") from None
    texts = [path for path in every if path.suffix.lower() in SUFFIXES]
    data = [
        path
        for path in every
        if path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
    ]
    if data:
        raise DataError(
            f"{folder}: a folder with files of data in it; name them: --data {data[0]}" + " ..." * (len(data) > 1)
        )
    if not texts:
        held = f"{every[0].name} and {len(every) - 1} more" if len(every) > 1 else every[0].name if every else "nothing"
        raise DataError(
            f"{folder}: a folder with no text file in it ({held}); wanted files ending in {', '.join(SUFFIXES)}"
        )
    if others := [path for path in every if path not in set(texts)]:
        say(
            f"{folder}: {len(others)} files are passed over, which do not end in {', '.join(SUFFIXES)} ({others[0].name})"
        )
    return texts


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
