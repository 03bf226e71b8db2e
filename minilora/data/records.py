"""Lines of a JSONL file as records: read and checked whole before anything trains, and refused by file and line.

A line is one of ``{"messages": [{"role", "content"}, ...]}``, ``{"prompt", "completion"}`` or ``{"text"}``. What else a line says and what
would change a run is used (``fields.py``) or refused by name; notes that change nothing (``source``, ``id``) are passed over, and
``unused`` counts them. Next file: ``data/fields.py``.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.data.fields import check_messages, check_options, check_text
from minilora.errors import DataError, nearest
from minilora.files.parse import once
from minilora.files.read import refuse_path

__all__ = ["Record", "Source", "check_record", "look_at", "read_jsonl", "records_of", "unused"]

LONGEST_LINE = 16_000_000  # bytes; some four million tokens, more than any context
Record = Mapping[str, Any]
_CHAT = {"system", "tools", "documents", "chat_template_kwargs"}  # what a chat template is given beside the turns
_FORMS = {"messages": {"messages"} | _CHAT, "prompt": {"prompt", "completion"} | _CHAT, "text": {"text"}}
_KNOWN = set.union(*_FORMS.values())
# What means something elsewhere and nothing here: a run that passed over it would learn something else than its author meant.
_MEANT = {
    *("weight", "weights", "train", "label", "labels", "input_ids", "assistant_masks", "completion_mask", "chosen"),
    *("rejected", "functions", "function_call", "tool_calls", "image", "images", "video", "videos", "audio", "audios"),
    *("system_prompt", "system_message", "chat_template"),
}


class _Line(dict[str, Any]):
    """A record that knows where it was read: the file and line for messages, and the line's number."""

    where = ""
    line = 0


@dataclass(frozen=True)
class Source:
    """A file of records as it was when it was looked at: its size in bytes, its hash, and its records."""

    path: Path
    size: int
    sha256: str
    records: int


def look_at(path: str | os.PathLike[str]) -> Source:
    """Read a file once, without looking into its lines. Raises ``DataError`` if there is none, or no line in it."""
    source, digest, size, count = _file(path), hashlib.sha256(), 0, 0
    for number, raw in _lines(source):
        digest.update(raw)
        size += len(raw)
        count += bool(_text(raw, number).strip())
    if not count:
        raise DataError(f"{source}: holds no example; wanted one JSON object a line")
    return Source(source, size, digest.hexdigest(), count)


def records_of(source: Source) -> Iterator[Record]:
    """The records one after the other, each checked. Raises as ``read_jsonl``; and ``DataError`` if the file is another one by now."""
    digest = hashlib.sha256()
    for number, raw in _lines(source.path):
        digest.update(raw)
        if (text := _text(raw, number)).strip():
            yield _record(text, source.path, number)
    if digest.hexdigest() != source.sha256:
        raise DataError(f"{source.path}: changed while it was read; start again when nothing writes to it")


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file, every line checked. A value of null is as good as none.

    Raises:
        DataError: no file, no record, a line that is longer than 16 MB, not UTF-8, not JSON, has a key twice, has none of the three
            forms, or a field that nothing would use; with path and line, and the byte of the line where there is one.
    """
    source = _file(path)
    records = [_record(text, source, number) for number, raw in _lines(source) if (text := _text(raw, number)).strip()]
    if not records:
        raise DataError(f"{source}: holds no example; wanted one JSON object a line")
    return records


def _file(path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    refuse_path(source, DataError)
    if not source.is_file():
        missing = "a folder, a pipe or a device, and no file" if source.exists() else "no such file"
        raise DataError(
            f"{source}: {missing}; wanted JSONL with 'messages', 'prompt' and 'completion', or 'text' in every line"
        )
    return source


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """``(number from 1, bytes)`` of each line; one that is too long comes in pieces, the first of which is too long as well."""
    try:
        with source.open("rb") as lines:
            yield from enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), 1)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check the path and its rights") from None


def _text(raw: bytes, number: int) -> bytes:
    return raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def unused(records: Iterable[Record]) -> Counter[str]:
    """Keys that nothing uses, each with the number of its records."""
    return Counter(
        key for record in records for key, value in record.items() if key not in _KNOWN and value is not None
    )


def _record(raw: bytes, source: Path, number: int) -> Record:
    where = f"{source}:{number}"
    record = _parsed(raw, where)
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: holds a {type(record).__name__}; wanted an object with 'messages', 'prompt' or 'text'"
        )
    try:
        check_record(record)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    line = _Line(record)
    line.where, line.line = where, number
    return line


def _parsed(raw: bytes, where: str) -> Any:
    if len(raw) > LONGEST_LINE:
        raise DataError(
            f"{where}: is longer than {LONGEST_LINE:,} bytes; write one example a line, and cut it into shorter ones"
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


def check_record(record: Record) -> None:
    """Raise ``DataError`` for a record that is of no form, or holds what its form has no use for."""
    said = {key for key, value in record.items() if value is not None}
    forms = [form for form in _FORMS if form in said or (form == "prompt" and "completion" in said)]
    form = next(iter(forms or [form for form in _FORMS if form in record]), None)
    if form is None:
        raise DataError(
            f"has the keys {str(sorted(record))[:200]}; wanted 'messages', 'prompt' and 'completion', or 'text'"
        )
    for key in sorted(said - _FORMS[form]):
        _check_key(key, form)
    if form == "messages":
        check_messages(record["messages"])
    else:
        for name in ("prompt", "completion") if form == "prompt" else ("text",):
            check_text(record.get(name), name)
    check_options(record)


def _check_key(key: str, form: str) -> None:
    used = ", ".join(sorted(_FORMS[form]))
    if key in _KNOWN or key in _MEANT:
        raise DataError(f"{key!r} is not used beside {form!r}, where {used} are; remove it, or say it in another form")
    close = nearest(key, _KNOWN, 1)
    if len(key) > 3 and any(key.lower().rstrip("s") == known.rstrip("s") for known in _KNOWN):
        raise DataError(f"{key!r} is not used; is {close} meant? Rename it, or remove it")
