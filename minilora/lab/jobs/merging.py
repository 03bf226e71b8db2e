"""The folders of a sweep's workers made one, as one process would have left it. Next file: ``lab/jobs/shown.py``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from minilora.errors import CheckpointError
from minilora.files.parse import parse_tensors
from minilora.files.read import read_bytes
from minilora.files.write import remove, write_file, write_files
from minilora.lab.sweeps.left import (
    CSV_FILE,
    LOG_FILE,
    STATE_FILE,
    SWEEP_FILE,
    WHERE_FILE,
    WORKERS_FILE,
    read_json,
    read_state,
    worker_folder,
)
from minilora.lab.sweeps.table import as_csv
from minilora.lab.sweeps.trial import Result
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE

__all__ = ["merge", "partial_table", "share_is_done", "tidy"]

Shares = Sequence[Sequence[str]]
Results = Mapping[str, Result]


def share_is_done(path: Path, number: int, names: Sequence[str]) -> bool:
    """Whether a worker has brought all of its trials to their ends."""
    place = worker_folder(path, number) / WHERE_FILE
    known: Mapping[str, Any] = read_json(place)["trials"] if place.exists() else {}
    return all(known.get(name, {}).get("finished") for name in names)


def partial_table(path: Path, shares: Shares, results: Results) -> None:
    """``runs.csv`` of what is done so far."""
    for number, names in enumerate(shares, 1):
        own = worker_folder(path, number)
        if (own / WHERE_FILE).exists():
            read_state(own, {name: results[name] for name in names})
    write_file(path / CSV_FILE, as_csv(list(results.values())))


def merge(path: Path, shares: Shares, results: Results) -> None:
    """Fill the results, and make one folder of all. What is killed in between is done again: a worker's folder goes last.

    Raises:
        CheckpointError: the workers had other data or another base than each other.
    """
    trials: dict[str, Any] = {}
    steps, meanings = 0, []
    for number, names in enumerate(shares, 1):
        own = worker_folder(path, number)
        where, _ = read_state(own, {name: results[name] for name in names})
        trials |= where["trials"]
        steps = max(steps, where["steps"])
        meanings.append(read_json(own / SWEEP_FILE))
        for name in names:
            _move_adapter(own / name, path / name, results[name])
    if any((one["data"], one["base"]) != (meanings[0]["data"], meanings[0]["base"]) for one in meanings):
        raise CheckpointError(f"{path}: the workers had other data or another base; begin anew with --overwrite")
    whole = meanings[0] | {
        "trials": {name: one["trials"][name] for name in results for one in meanings if name in one["trials"]}
    }
    content = safetensors.torch.save({})
    state = {"steps": steps, "sha256": hashlib.sha256(content).hexdigest()}
    state |= {"trials": {name: trials[name] for name in results}}
    lines = [json.dumps({"run": name} | record) for name, result in results.items() for record in result.records]
    files = {
        SWEEP_FILE: json.dumps(whole, indent=1),
        WHERE_FILE: json.dumps(state),
        CSV_FILE: as_csv(list(results.values())),
    }
    files[LOG_FILE] = "".join(f"{line}\n" for line in lines)
    write_files(path, {STATE_FILE: content} | {name: text.encode() for name, text in files.items()})
    tidy(path, len(shares))


def tidy(path: Path, count: int) -> None:
    """Remove what belonged to the workers, after the merge; the list of them goes last."""
    gone = [*(worker_folder(path, number).name for number in range(1, count + 1)), WORKERS_FILE]
    remove(path, [name for name in gone if (path / name).exists()])


def _move_adapter(own: Path, there: Path, result: Result) -> None:
    """A trial's adapter into the sweep's folder; its weights into the result."""
    if result.trial.lora is None or result.ended:
        return
    files = {name: read_bytes(own / name, "an adapter") for name in (WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE)}
    result.weights, _ = parse_tensors(files[WEIGHTS_FILE], own / WEIGHTS_FILE)
    write_files(there, {name: bytes(content) for name, content in files.items()})
