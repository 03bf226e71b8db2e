"""Runs side by side: which settings differ, what came of each, and what each answers to the same prompts.

Everything is read from ``job.json`` and ``log.jsonl`` of the run folders. Next file: ``report/runs_page.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, ConfigError
from minilora.files.read import refuse_path
from minilora.job.given import setting_names
from minilora.job.record import DataFile, Record, read_record
from minilora.report.tables import human_bytes
from minilora.store.adapter_files import WEIGHTS_FILE
from minilora.training.left import LOG_FILE, kept_records

__all__ = ["Comparison", "Run", "compare"]

# What says where a run lies, or how it was begun, and nothing of what it does.
_APART = {
    "quant",
    "double_quant",
    "out",
    "resume",
    "overwrite",
    "push_to_hub",
    "private",
    "prompts",
    "data",
    "eval_data",
    "model",
    "keep_checkpoints",
    "save_every",
}
_NOTHING = "-"


@dataclass(frozen=True)
class Run:
    """One run as read: its folder, what it is called here, the lines of its log, and what it remembers (None if it has no ``job.json``)."""

    folder: Path
    name: str
    records: list[dict[str, Any]]
    record: Record | None


@dataclass(frozen=True)
class Comparison:
    """Rows of texts, one text for each run.

    Attributes:
        runs: as they were given. settings: those that differ, by name. results: losses, time and memory, by what they are.
        answers: by prompt the answer of each run, and the answer of the base before it where that is the same for all. notes: what
            could not be compared.
    """

    runs: list[Run]
    settings: dict[str, list[str]]
    results: dict[str, list[str]]
    answers: dict[str, dict[str, str]]
    notes: list[str]

    @property
    def names(self) -> list[str]:
        """What the runs are called."""
        return [run.name for run in self.runs]


def compare(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Read runs and put them side by side.

    Raises:
        ConfigError: fewer than two. CheckpointError: a folder without a log, or with a damaged record.
    """
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} run to compare; wanted at least two folders")
    places = [Path(folder) for folder in folders]
    runs = [_read(place, name) for place, name in zip(places, _names(places), strict=True)]
    without = [str(run.folder) for run in runs if run.record is None]
    notes = [f"no job.json, so no settings and no answers: {', '.join(without)}"] if without else []
    return Comparison(runs, _settings(runs), _results(runs), _answers(runs), notes)


def _read(place: Path, name: str) -> Run:
    refuse_path(place)
    if not (place / LOG_FILE).is_file():
        raise CheckpointError(f"{place}: no run lies there ({LOG_FILE} is missing); wanted the --out of minilora train")
    records = kept_records(place)
    if not any("loss" in record for record in records):
        raise CheckpointError(f"{place}: its {LOG_FILE} has no step yet; wait for the run, or leave it out")
    return Run(place, name, records, read_record(place))


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [place.resolve().parts for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{place} ({number})" for number, place in enumerate(places, 1)]  # one folder twice


# ---- what differs


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    known = [_said(run.record) for run in runs]
    names = dict.fromkeys(name for settings in known for name in settings)
    rows = {name: [settings.get(name, _NOTHING) for settings in known] for name in names}
    return {name: texts for name, texts in rows.items() if len(set(texts)) > 1}


def _file(file: DataFile) -> str:
    weight = "" if file.weight == 1 else f" x {file.weight:g}"
    return f"{Path(file.path).name} ({file.sha256[:8]}){weight}{' to evaluate on' * (file.purpose != 'learn')}"


def _said(record: Record | None) -> dict[str, str]:
    """Every setting in words; of the data what it holds, and not where it lay."""
    if record is None:
        return {}
    files = ", ".join(map(_file, record.data))
    names = setting_names() - _APART
    own = {"model": record.model, "packing": str(record.packing), "data": files, "system": record.system or "none"}
    rest = {name: _word(value) for name, value in record.settings.items() if name in names}
    versions = {f"version of {name}": version for name, version in record.versions.items()}
    return own | rest | {"device": record.device, "dtype": record.dtype} | versions


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" or value == {} else str(value)


def _results(runs: Sequence[Run]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {
        "steps": [str(max(record["step"] for record in run.records)) for run in runs],
        "training loss, first": [_loss(_values(run, "loss"), 0) for run in runs],
        "training loss, last": [_loss(_values(run, "loss"), -1) for run in runs],
        "held-out loss, first": [_loss(_values(run, "eval_loss"), 0) for run in runs],
        "held-out loss, last": [_loss(_values(run, "eval_loss"), -1) for run in runs],
        "held-out loss, least": [_loss(sorted(_values(run, "eval_loss")), 0) for run in runs],
        "training, s": [_seconds(run) for run in runs],
        "all of it, s": [f"{sum(run.record.seconds.values()):.0f}" if run.record else _NOTHING for run in runs],
        "peak memory": [_memory(run) for run in runs],
        "adapter": [_size(run.folder / WEIGHTS_FILE) for run in runs],
    }
    return {name: texts for name, texts in rows.items() if set(texts) != {_NOTHING}}


def _values(run: Run, key: str) -> list[float]:
    return [record[key] for record in run.records if record.get(key) is not None]


def _loss(values: Sequence[float], at: int) -> str:
    return f"{values[at]:.3f}" if values else _NOTHING


def _seconds(run: Run) -> str:
    told = [record["seconds"] for record in run.records if "seconds" in record]
    return f"{max(told):.0f}" if told else _NOTHING


def _memory(run: Run) -> str:
    most = max(run.record.peak_mb.values(), default=0.0) if run.record else 0.0
    told = most or max((record["rss_mb"] for record in run.records if "rss_mb" in record), default=0.0)
    return human_bytes(told * 1e6) if told else _NOTHING


def _size(path: Path) -> str:
    return human_bytes(path.stat().st_size) if path.is_file() else _NOTHING


def _answers(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """By prompt that every run was asked: who said what."""
    each = [{answer["prompt"]: answer for answer in run.record.answers} if run.record else {} for run in runs]
    common = [prompt for prompt in each[0] if all(prompt in asked for asked in each)]
    return {prompt: _said_by(runs, [asked[prompt] for asked in each]) for prompt in common}


def _said_by(runs: Sequence[Run], answers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    before = {answer["before"] for answer in answers}
    base = {"before training": before.pop()} if len(before) == 1 else {}
    return base | {run.name: answer.get("after", "(has not ended)") for run, answer in zip(runs, answers, strict=True)}
