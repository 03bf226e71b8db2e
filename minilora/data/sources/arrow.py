"""Parquet and Arrow: columns of values, read by pyarrow, which ``datasets`` brings, a few rows at a time.

Rows are numbered from 1, as lines are. Next file: ``data/sources/hub.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.data.sources.part import Part, Rows, hash_of
from minilora.data.sources.stream import changed, hashed
from minilora.errors import DataError, MissingPackageError

__all__ = ["ROWS", "look", "needs", "saved", "saved_part"]

ROWS = 512  # that are in memory at a time
_PARQUET, _FILE = b"PAR1", b"ARROW1"


def needs(name: object, package: str = "datasets") -> None:
    """Raise ``MissingPackageError`` where a package is not installed that reads ``name``."""
    if find_spec(package) is None:
        raise MissingPackageError(f"{name}: is read by {package}, which is not installed; pip install 'minilora[data]'")


def look(path: Path) -> Part:
    """Read a file once, without looking into its rows."""
    needs(path, "pyarrow")
    kind = "Parquet" if _begins(path, _PARQUET) else "Arrow"
    with _opened(path) as (_, count):
        pass
    if not count:
        raise DataError(f"{path}: holds no row; wanted one for each example")
    size, found = hashed(path)
    return Part(str(path), kind, size, found, count, lambda: _rows([path], str(path), [found]))


def saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of datasets."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_part(folder: Path, name: str) -> Part:
    """The rows of a folder that ``save_to_disk`` wrote: of its split ``train``, where it has several."""
    needs(folder)
    if (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"{folder}: holds the splits {', '.join(splits)[:200]}; name one: --data {folder / (splits or ['train'])[0]}"
        )
    files, count = _files_of(folder), 0
    for file in files:
        with _opened(file) as (_, rows):
            count += rows
    if not count:
        raise DataError(f"{folder}: holds no row; wanted one for each example")
    each = [hashed(file) for file in files]
    hashes = [digest for _, digest in each]
    size = sum(size for size, _ in each)
    return Part(name, "Arrow", size, hash_of(hashes), count, lambda: _rows(files, name, hashes))


def _files_of(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set, in the order of its rows."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: state.json cannot be read ({str(error)[:200]}); save the data set again") from None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder}: its rows are chosen by an index; save it after flatten_indices()")
    return [folder / name for name in names]


def _rows(files: Sequence[Path], name: str, hashes: Sequence[str]) -> Rows:
    number = 0
    for file, digest in zip(files, hashes, strict=True):
        with _opened(file) as (batches, _):
            for row in _values(batches, file):
                number += 1
                yield number, row
        if hashed(file)[1] != digest:
            raise changed(name)


def _values(batches: Iterator[Any], file: Path) -> Iterator[Any]:
    try:
        for batch in batches:
            batch.validate(full=True)  # pyarrow takes the offsets of a file as they stand
            for start in range(0, batch.num_rows, ROWS):
                yield from batch.slice(start, ROWS).to_pylist()
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # pyarrow's errors are of these types
        if isinstance(error, DataError):
            raise
        raise _damaged(file, error) from None


class _opened:
    """The batches of a file, and the number of its rows."""

    def __init__(self, path: Path) -> None:
        self.path, self.stack = path, ExitStack()

    def __enter__(self) -> tuple[Iterator[Any], int]:
        try:
            return self._batches()
        except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
            self.stack.close()
            raise _damaged(self.path, error) from None

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _batches(self) -> tuple[Iterator[Any], int]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if _begins(self.path, _PARQUET):
            file = self.stack.enter_context(pq.ParquetFile(self.path))
            return file.iter_batches(batch_size=ROWS), file.metadata.num_rows
        source = self.stack.enter_context(pa.memory_map(str(self.path)))
        if _begins(self.path, _FILE):
            reader = self.stack.enter_context(pa.ipc.open_file(source))
            every = (reader.get_batch(at) for at in range(reader.num_record_batches))
            return every, sum(reader.get_batch(at).num_rows for at in range(reader.num_record_batches))
        count = sum(batch.num_rows for batch in pa.ipc.open_stream(source))
        source.seek(0)
        return iter(self.stack.enter_context(pa.ipc.open_stream(source))), count


def _begins(path: Path, sign: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(sign)) == sign


def _damaged(path: Path, error: Exception) -> DataError:
    kind = "Parquet" if path.is_file() and _begins(path, _PARQUET) else "Arrow"
    said = " ".join(str(error).split())[:200]
    return DataError(f"{path}: damaged, or no {kind} ({said}); copy or write it again")
