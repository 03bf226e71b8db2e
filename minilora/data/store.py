"""Tokens of a file of any size: written once into the cache, and read by place from then on.

The rule: a file of records of less than 4 MB is encoded in memory, anew in every run, which takes seconds. A larger one is encoded piece
by piece into ``<cache>/tokens/<key>``, and the next run takes what is there. The key is the SHA-256 of all that the tokens depend on: the
file's bytes and its format, the tokenizer's files with its chat template and its code, the day if the template prints it, ``max_length``
and what becomes of longer examples, the names of fields, the system turn, the versions of the packages that tokenize, and the code of this
folder. So a store is never of other data; it can be removed at any time.

A store is four files: ``tokens.bin``, the tables ``examples.bin`` and ``records.bin``, and ``store.json`` with their hashes and sizes. The
tables are verified when a store is opened, and one that is damaged is made anew. Tokens are verified when they are read, by the digest
of their example, and refused by name. It is whole or not there at all (``files/write.py``), and several processes may make it at a time:
the first one's stays. Next file: ``data/batches.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.data.encoding import lessons
from minilora.data.examples import EXAMPLE, Examples, in_tokens, row_of
from minilora.data.lesson import Lesson, Tally, none_useful
from minilora.data.numbers import Numbers, Shelf
from minilora.data.places import Places
from minilora.data.records import Reading, Record, Source, records_of, shapes, unused
from minilora.data.store_key import key_of
from minilora.errors import CheckpointError, WriteError
from minilora.files import disk
from minilora.files.parse import parse_json
from minilora.files.read import read_files
from minilora.files.write import new_folder, remove

__all__ = ["SMALL", "Data", "Way", "load_data"]

SMALL = 4_000_000  # bytes of a file of records that is encoded in memory
_PIECE = 1024  # records that are in memory at a time; each piece starts a process that renders them
_NOTED = 5  # keys that nothing uses, and shapes, that are said
_TRIES = 3  # beside other processes
_INDEX = "store.json"
_TABLES = ("examples.bin", "records.bin")
_TOKENS = "tokens.bin"
# What became of a record: its line, examples, those with something to learn, and ``Tally``.
_RECORD = np.dtype([("line", "<i8"), ("useful", "<i4"), ("tally", "<i4", (len(Tally._fields),))])
_Write = Callable[[str, bytes], None]
_Counts = Mapping[str, Counter[str]]


@dataclass(frozen=True)
class Way:
    """How records become examples.

    Args:
        max_length: in tokens. date: day that the chat template prints, "" if it prints none. truncate: as of ``encode_all``.
        reading: names of fields, and the system turn.
    """

    max_length: int
    date: str = ""
    truncate: bool = False
    reading: Reading = field(default_factory=Reading)

    @property
    def key(self) -> dict[str, Any]:
        """What of it the tokens depend on."""
        own = {"max_length": self.max_length, "date": self.date, "truncate": self.truncate}
        return own | {"columns": list(self.reading.columns), "system": self.reading.system}


@dataclass(frozen=True)
class Data:
    """All records of a source, encoded.

    Attributes:
        records: what became of each. examples: all of them. unused: keys that nothing uses, and shapes: what the records were, each with
            the number of its records. max_length: in tokens.
    """

    records: NDArray[np.void]
    examples: Examples
    unused: Counter[str]
    shapes: Counter[str]
    max_length: int

    def __len__(self) -> int:
        return len(self.records)

    def of(self, records: Sequence[int]) -> Examples:
        """The examples of some records, in the order of the files; as often as a record is named.

        Raises:
            DataError: nothing is to be learnt from them.
        """
        times = np.bincount(np.asarray(records, dtype=np.int64), minlength=len(self))
        every = np.arange(len(self.examples.table), dtype=np.int32)
        chosen = np.repeat(every, times[self.examples.table["record"]])
        if not len(chosen):
            raise none_useful(len(records), self.max_length)
        return replace(self.examples, chosen=chosen)

    def tally(self, records: Sequence[int]) -> Tally:
        """How the conversations among some records were encoded."""
        return Tally(*(int(total) for total in self.records["tally"][records].sum(0, dtype=np.int64)))

    @property
    def left_out(self) -> int:
        """Records of which nothing is left to learn."""
        return int((self.records["useful"] == 0).sum())

    @classmethod
    def together(cls, each: Sequence[Data]) -> Data:
        """The data of several sources one behind the other."""
        if len(each) == 1:
            return each[0]
        table = np.concatenate([data.examples.table for data in each])
        table["record"] += np.repeat(
            np.cumsum([0, *map(len, each[:-1])]), [len(data.examples.table) for data in each]
        ).astype("<i4")
        tokens, places = (
            Shelf([data.examples.tokens for data in each]),
            Places.together([d.examples.places for d in each]),
        )
        unused: Counter[str] = sum((data.unused for data in each), Counter())
        shapes: Counter[str] = sum((data.shapes for data in each), Counter())
        return cls(
            np.concatenate([data.records for data in each]),
            _examples(tokens, table, places),
            unused,
            shapes,
            each[0].max_length,
        )


def load_data(source: Source, tokenizer: Any, way: Way, cache: Path, say: Callable[[str], None] = print) -> Data:
    """The records of a source, encoded as ``encode_all`` encodes them: in memory if it is small, else from its store.

    Args:
        source: as ``records.look_at`` returns it. cache: folder that stores lie in. say: gets a line where a store is made.

    Raises:
        DataError: as ``records.read`` and ``encode_all``; or the source changed meanwhile. WriteError: a store cannot be written.
    """
    if source.size < SMALL:
        files = {name: bytearray() for name in (_TOKENS, *_TABLES)}
        counts = _encode(source, tokenizer, way, lambda name, content: files[name].extend(content))
        if not files[_TOKENS]:
            raise none_useful(source.records, way.max_length)
        return _data(Numbers(files[_TOKENS]), files, counts, source, way)
    key = key_of(source, tokenizer, way.key)
    place = cache / "tokens" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    for _ in range(_TRIES):
        if disk.used.kind(place) is not None:
            try:
                return _opened(place, key, source, way)
            except _Damaged as damage:
                say(f"{place}: damaged ({damage}), so it is made anew")
                with suppress(WriteError):  # another process was first
                    remove(place.parent, [place.name])
        else:
            say(f"encoding {source.records} examples into {place}, once")
        try:
            new_folder(place, lambda staged: _fill(staged, key, source, tokenizer, way))
        except WriteError:
            if disk.used.kind(place) is None:
                raise
    raise CheckpointError(
        f"{place}: cannot be read, though it was just written; remove the folder, or look at the disk"
    )


# ---- making one


def _encode(source: Source, tokenizer: Any, way: Way, write: _Write) -> _Counts:
    """Write tokens and tables of all records, a piece at a time; returns the keys that nothing uses, and the shapes."""
    counts = {"unused": Counter[str](), "shapes": Counter[str]()}
    done = 0
    for piece in _pieces(records_of(source, way.reading)):
        counts["unused"].update(unused(piece))
        counts["shapes"].update(shapes(piece))
        made = list(lessons(piece, tokenizer, way.max_length, way.truncate))
        _write_piece(piece, made, done, write)
        done += len(piece)
    return {name: Counter(dict(found.most_common(_NOTED))) for name, found in counts.items()}


def _pieces(records: Iterable[Record]) -> Iterable[list[Record]]:
    piece: list[Record] = []
    for record in records:
        piece.append(record)
        if len(piece) == _PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _write_piece(piece: Sequence[Record], made: Sequence[Lesson], done: int, write: _Write) -> None:
    useful = [(done + at, each) for at, lesson in enumerate(made) for each in lesson.examples if each.supervised]
    rows = [
        (record.line, sum(each.supervised > 0 for each in lesson.examples), lesson.tally)  # type: ignore[attr-defined]
        for record, lesson in zip(piece, made, strict=True)
    ]
    write("records.bin", np.array(rows, dtype=_RECORD).tobytes())
    write("examples.bin", np.array([row_of(each, record) for record, each in useful], dtype=EXAMPLE).tobytes())
    write(_TOKENS, b"".join(in_tokens(each).tobytes() for _, each in useful))


def _fill(staged: Path, key: Mapping[str, Any], source: Source, tokenizer: Any, way: Way) -> None:
    """The files of a store."""
    sizes, hashes = Counter({_TOKENS: 0}), {name: hashlib.sha256() for name in _TABLES}

    def write(name: str, content: bytes) -> None:
        disk.used.append(staged / name, content)
        sizes[name] += len(content)
        if name in hashes:
            hashes[name].update(content)

    counts = _encode(source, tokenizer, way, write)
    if not sizes[_TOKENS]:
        raise none_useful(source.records, way.max_length)
    found = {name: digest.hexdigest() for name, digest in hashes.items()}
    disk.used.write(staged / _INDEX, _index_bytes({"key": key, "sizes": sizes, "sha256": found, "counts": counts}))


def _index_bytes(content: Mapping[str, Any]) -> bytes:
    """The one form of an index, its own hash in it: any other bytes are damage."""
    body = {name: content[name] for name in ("key", "sizes", "sha256", "counts")}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "own": own}, indent=1, sort_keys=True) + "\n").encode()


# ---- opening one


class _Damaged(Exception):
    """A store that is not whole, or not what its key says."""


def _opened(place: Path, key: Mapping[str, Any], source: Source, way: Way) -> Data:
    try:
        files = read_files(place, dict.fromkeys((_INDEX, *_TABLES), "a store of tokens"))
        index = parse_json(files[_INDEX])
        whole = _index_bytes(index) == files[_INDEX] and index["key"] == key
        counts = {name: Counter(index["counts"][name]) for name in ("unused", "shapes")}
        tokens = Numbers(place / _TOKENS)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(" ".join(str(error).split())[:200]) from None
    if not whole:
        raise _Damaged(f"{_INDEX} is not as it was written")
    for name in _TABLES:
        if hashlib.sha256(files[name]).hexdigest() != index["sha256"][name]:
            raise _Damaged(f"{name} is not as it was written")
    if 4 * len(tokens) != index["sizes"][_TOKENS]:
        raise _Damaged(f"{_TOKENS} has another size than it was written with")
    return _data(tokens, files, counts, source, way, place)


def _data(
    tokens: Numbers,
    files: Mapping[str, bytearray],
    counts: _Counts,
    source: Source,
    way: Way,
    place: Path | None = None,
) -> Data:
    table, records = np.frombuffer(files["examples.bin"], EXAMPLE), np.frombuffer(files["records.bin"], _RECORD)
    names, ends = [part.name for part in source.parts], list(accumulate(part.records for part in source.parts))
    places = Places(records["line"], names, ends, [place] * len(names))
    return Data(records, _examples(tokens, table, places), **counts, max_length=way.max_length)


def _examples(tokens: Numbers, table: NDArray[np.void], places: Places) -> Examples:
    starts = np.cumsum(table["length"], dtype=np.int64) - table["length"]
    return Examples(tokens, table, starts, np.arange(len(table), dtype=np.int32), places)
