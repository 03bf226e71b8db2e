"""What lies in the folder of a sweep (``lab/sweeps/folder.py`` has the list): whether it is in the way, its removal, and its state read.

Next file: ``lab/sweeps/table.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from minilora.errors import CheckpointError, ConfigError, MiniLoraError
from minilora.files.parse import parse_json
from minilora.files.read import read_bytes, refuse_path
from minilora.files.write import remove
from minilora.lab.sweeps.trial import Result
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.training.left import RECORD_FILE
from minilora.training.lock import refuse_held

__all__ = [
    "CSV_FILE",
    "FIGURES",
    "KINDS",
    "KNOWN",
    "LOG_FILE",
    "REPORT_FILE",
    "STATE_FILE",
    "SWEEP_FILE",
    "WHERE_FILE",
    "WORKERS_FILE",
    "claim",
    "clear",
    "read_json",
    "read_state",
    "refuse_in_the_way",
    "worker_folder",
]

SWEEP_FILE, STATE_FILE, WHERE_FILE, CSV_FILE, LOG_FILE = (
    "sweep.json", "state.safetensors", "state.json", "runs.csv", "log.jsonl")  # fmt: skip
WORKERS_FILE = "workers.json"
REPORT_FILE, FIGURES, KINDS = "report.html", ("sweep-rates", "sweep-regret", "sweep-frontier"), ("png", "svg", "pdf")
_DRAWN = [f"{name}.{kind}" for name in FIGURES for kind in KINDS]  # by ``lab/verdicts/report.py``
_OWN = (SWEEP_FILE, STATE_FILE, WHERE_FILE, CSV_FILE, LOG_FILE, WORKERS_FILE, REPORT_FILE, *_DRAWN)
_ANEW = "restore it, or begin anew with --overwrite (overwrite=True)"
KNOWN = ("ended", "seconds", "measured", "alone", "parameters")  # of a result, in the state
_ADAPTER = (WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE)


def claim(path: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which a sweep lies that nobody said what to do with, or goes on; nothing is changed.

    Raises:
        ConfigError: resume and overwrite both, or a file. CheckpointError: a sweep lies there, or goes on there.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite are both set; wanted one: go on with the sweep, or begin anew")
    refuse_path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"out={str(path)!r} is a file; wanted a folder for the sweep")
    refuse_held(path)
    if os.path.lexists(path / RECORD_FILE):
        raise CheckpointError(f"{path}: holds a run of minilora train ({RECORD_FILE}), no sweep; choose another folder")
    lies = next((name for name in _OWN if os.path.lexists(path / name)), None)
    if lies and not (resume or overwrite):
        raise CheckpointError(
            f"{path}: holds a sweep already ({lies}); go on with it by --resume (resume=True), replace it by --overwrite "
            "(overwrite=True), or choose another folder"
        )


def refuse_in_the_way(path: Path, names: Sequence[str]) -> None:
    """Raise ``CheckpointError`` if something lies where a trial's adapter will, which no sweep has left there."""
    known = trials_in(path)
    for name in names:
        place = path / name
        if name not in known and os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
            raise CheckpointError(
                f"{place}: lies there already, and no sweep has left it; move it away, or choose another folder"
            )


def trials_in(path: Path) -> set[str]:
    """The names of the trials of the sweep that lies in a folder; where the file that has them is damaged, those in its log."""
    try:
        known = set(read_json(path / SWEEP_FILE)["trials"]) if (path / SWEEP_FILE).exists() else set()
        shares = read_json(path / WORKERS_FILE)["shares"] if (path / WORKERS_FILE).exists() else []
        return known.union(*shares)
    except (MiniLoraError, KeyError, TypeError):
        found = _logged(path) if (path / LOG_FILE).exists() else {}
        return {name for name in found if isinstance(name, str) and (path / name).parent == path}


def clear(path: Path) -> None:
    """Remove what a sweep left there: its own files, the adapters of the trials that it names, and the folders of its workers."""
    for name in trials_in(path):
        if (path / name).is_dir():
            remove(path / name, [file for file in _ADAPTER if os.path.lexists(path / name / file)])
    shares = read_json(path / WORKERS_FILE)["shares"] if (path / WORKERS_FILE).exists() else []
    own = [worker_folder(path, number).name for number in range(1, len(shares) + 1)]
    remove(path, [name for name in (*_OWN, *own) if os.path.lexists(path / name)])


def worker_folder(path: Path, number: int) -> Path:
    """Where worker ``number``, from 1, has its part of a sweep."""
    return path / f"worker-{number}"


def read_state(path: Path, results: Mapping[str, Result]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fill results with what the state in a folder knows of them; returns where it was, and its tensors. Raises ``CheckpointError``."""
    where, content = read_json(path / WHERE_FILE), read_bytes(path / STATE_FILE, "the state of a sweep")
    if not isinstance(where.get("trials"), dict) or not isinstance(where.get("steps"), int):
        raise CheckpointError(f"{path / WHERE_FILE}: damaged (it does not say where the trials are); {_ANEW}")
    if hashlib.sha256(content).hexdigest() != where.get("sha256"):
        raise CheckpointError(f"{path / STATE_FILE}: damaged; {_ANEW}")
    if strange := sorted(where["trials"].keys() - results.keys()):
        raise CheckpointError(f"{path / WHERE_FILE}: damaged (it knows of {strange[0]!r}, which is no trial); {_ANEW}")
    logged = _logged(path)
    for name, position in where["trials"].items():
        result = results[name]
        if not isinstance(position, dict) or not {*KNOWN, "finished", "records"} <= position.keys():
            raise CheckpointError(f"{path / WHERE_FILE}: damaged (it does not say where {name} is); {_ANEW}")
        result.records = logged.get(name, [])[: position["records"]]
        if len(result.records) < position["records"]:
            raise CheckpointError(
                f"{path / LOG_FILE}: lacks lines of {name}; restore it, or begin anew with --overwrite (overwrite=True)"
            )
        for key in (*KNOWN, "finished"):
            setattr(result, key, position[key])
    return where, safetensors.torch.load(bytes(content))


def _logged(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The records in the log by trial, up to the first line that is none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_bytes(path / LOG_FILE, "a log").decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
            found.setdefault(record.pop("run"), []).append(record)
        except (ValueError, KeyError, AttributeError):
            break
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file of a sweep that says what it is. Raises ``CheckpointError``."""
    try:
        return parse_json(read_bytes(path, "a sweep"))
    except MiniLoraError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); {_ANEW}") from None
