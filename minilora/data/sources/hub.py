"""Data sets of the Hugging Face Hub: fetched by ``datasets`` into its cache, or found there where the network is off.

Next file: ``data/shapes/names.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora.data.sources.arrow import ROWS, needs
from minilora.data.sources.names import Named
from minilora.data.sources.part import Part, Rows, hash_of
from minilora.data.sources.stream import changed, hashed
from minilora.errors import DataError

__all__ = ["look"]


def look(name: Named, say: Callable[[str], None]) -> Part:
    """A split of a data set; fetched, where it is not in the cache.

    Raises:
        DataError: no such data set, configuration or split, or no network to fetch it. MissingPackageError: no ``datasets``.
    """
    needs(name.what)
    with _quiet():
        import datasets

        say(f"{name.what}: no file of this name here, so the data set of the Hub is read")
        if datasets.config.HF_HUB_OFFLINE and not _is_cached(name.what, datasets):
            raise _absent(name, "the network is switched off (HF_HUB_OFFLINE), and it is not in the cache of datasets")
        found = _loaded(name, datasets)
    files = sorted({Path(entry["filename"]) for entry in found.cache_files})
    if not found.num_rows or not files:
        raise DataError(f"{_shown(name)}: holds no row; wanted one for each example")
    each = [hashed(file) for file in files]
    hashes = [digest for _, digest in each]
    digest = hash_of([name.config, name.split or "train", *hashes])  # a split may be a slice: train[:1000]
    size = sum(size for size, _ in each)
    return Part(_shown(name), "data set", size, digest, found.num_rows, lambda: _rows(found, files, hashes))


def _rows(found: Any, files: Sequence[Path], hashes: Sequence[str]) -> Rows:
    number = 0
    for table in found.with_format("arrow").iter(batch_size=ROWS):
        for row in table.to_pylist():
            number += 1
            yield number, row
    if [hashed(file)[1] for file in files] != hashes:
        raise changed(files[0])


def _loaded(name: Named, datasets: Any) -> Any:
    """The split that is meant."""
    options = {"name": name.config} if name.config else {}
    try:
        found = datasets.load_dataset(name.what, **options, split=name.split or None)
        if not name.split:
            if list(found) != ["train"] and "train" not in found:
                raise _absent(name, f"it has the splits {', '.join(found)}; name one: {name.what}:{next(iter(found))}")
            found = found["train"]
    except DataError:
        raise
    except Exception as error:  # whatever the network or the data set says, in one line
        raise _absent(name, _reason(error)) from None
    return found


def _is_cached(what: str, datasets: Any) -> bool:
    owner, short = what.split("/")
    folder = f"{owner}___{datasets.naming.camelcase_to_snakecase(short)}"
    return any(Path(datasets.config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*/dataset_info.json"))


def _shown(name: Named) -> str:
    return "/".join(filter(None, (name.what, name.config))) + f":{name.split or 'train'}"


def _absent(name: Named, reason: str) -> DataError:
    return DataError(
        f"{name.what}: no file or folder here, and no data set of the Hub that can be read ({reason}); "
        "check the name, or fetch it where there is a network"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of datasets: what there is to say is said here."""
    import datasets

    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
