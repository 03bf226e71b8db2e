"""What a run leaves in its folder, beside checkpoints: whether it is in the way of another run, and the log as far as it holds.

Next file: ``training/meaning.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, ConfigError
from minilora.files.parse import parse_json
from minilora.files.read import refuse_path
from minilora.files.write import remove
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.training.checkpoint import own_checkpoints, steps
from minilora.training.lock import refuse_held
from minilora.training.processes import ALONE, Processes
from minilora.training.profile import TRACE_FILE

__all__ = ["LOG_FILE", "RECORD_FILE", "claim", "clear", "kept_records", "refuse_left"]

LOG_FILE = "log.jsonl"
RECORD_FILE = "job.json"  # what a job remembers (``job/record.py``)
# What a run leaves beside its checkpoints.
_LEFT = (LOG_FILE, RECORD_FILE, TRACE_FILE, "report.html", "probe.json", WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE)
_LONGEST_LINE = 16_000_000  # bytes of the log; an answer is far shorter
_LARGEST = 1e300


def claim(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ``CheckpointError`` if a run goes on in the folder, or lies there and nobody said what to do with it; nothing is changed."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted one: go on with the run, or begin anew")
    refuse_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={str(folder)!r} is a file; wanted a folder for the run")
    refuse_held(folder)
    if not (resume or overwrite):
        refuse_left(folder)


def refuse_left(folder: Path) -> None:
    """Raise ``CheckpointError`` if a run lies in the folder."""
    if left := _left(folder):
        raise CheckpointError(
            f"{folder}: holds a run already ({left[0]}); go on with it by --resume (resume=True), replace it by --overwrite "
            "(overwrite=True), or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove what a run left in the folder; files of others stay."""
    remove(folder, own_checkpoints(folder) + _files_left(folder))


def _left(folder: Path) -> list[str]:
    return [f"checkpoint-{step}" for step in steps(folder)] + _files_left(folder)


def _files_left(folder: Path) -> list[str]:
    return [name for name in _LEFT if os.path.lexists(folder / name)]


def kept_records(
    folder: Path, step: float = math.inf, processes: Processes = ALONE, owner: int = 0
) -> list[dict[str, Any]]:
    """The lines of the log, up to a step; what came after it will come again, and a line that a power cut tore is left out.

    Of several processes the one that has the checkpoint, ``owner``, tells its lines to all.
    """
    return processes.share(_records(folder, step) if processes.rank == owner else None)[owner]


def _records(folder: Path, step: float) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    if not (folder / LOG_FILE).is_file():
        return records
    with (folder / LOG_FILE).open("rb") as log:
        while line := log.readline(_LONGEST_LINE):  # what is longer is read in pieces, and no piece is a record
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if _is_record(record) and record["step"] <= step:
                records.append(record)
    return records


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line is one that the loop writes, with numbers where the report draws numbers: the file may have been edited."""
    texts = {"prompt", "answer", "skipped"}
    plain = all(
        isinstance(value, str) if key in texts else key == "eval_loss" if value is None else _is_number(value)
        for key, value in record.items()
    )
    whole = plain and type(record.get("step")) is int and record["step"] >= 0
    return whole and isinstance(record.get("seconds", 0.0), float) and record.get("seconds", 0.0) >= 0


def _is_number(value: Any) -> bool:
    return (
        type(value) in (int, float) and -_LARGEST < value < _LARGEST
    )  # not NaN, and no whole number beyond all floats
