"""What a run folder remembers of its job, ``job.json``: the base, how it was packed, what was asked and how, and every session of the run.

It is written before the first step, and again when a session ends; whoever asks, merges or exports the adapter later takes from it what
would otherwise have to be said again. A file is data: nothing in it lets code run, and every field is checked. Next file:
``job/sessions.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, ConfigError, MiniLoraError
from minilora.files import disk, validate
from minilora.files.parse import LONGEST_JSON, parse_json
from minilora.files.read import refuse_path
from minilora.files.write import write_file
from minilora.hf.dates import check_date
from minilora.hf.places import DTYPE_NAMES, check_place
from minilora.store.fingerprint import is_fingerprint
from minilora.training.left import RECORD_FILE

__all__ = ["RECORD_FILE", "DataFile", "Packing", "Record", "Session", "read_record", "write_record"]

_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
_MOST = 2**53  # of what is counted
_LONGEST = 1e15  # seconds, megabytes


@dataclass(frozen=True)
class Packing:
    """How the linear layers of a base lie in memory.

    Attributes:
        quant: their format, "none" if they are dense. double_quant: whether their scales are in 8 bits. by_folder: whether the base's
            own folder holds them so, and nothing had to be packed. blocksize: weights that share a scale. levels: SHA-256 of the levels of
            the format, "" where nothing is packed.
    """

    quant: str
    double_quant: bool = False
    by_folder: bool = False
    blocksize: int = 64
    levels: str = ""

    def __str__(self) -> str:
        if self.quant == "none":
            return "not packed"
        blocks = "" if self.blocksize == 64 else f", blocks of {self.blocksize}"
        return f"packed to {self.quant}" + ", double quantization" * self.double_quant + blocks


@dataclass(frozen=True)
class DataFile:
    """One file of the data: ``path`` as it was given, its SHA-256, its weight beside the others, and what it is for: learn, or evaluate."""

    path: str
    sha256: str
    weight: float = 1.0
    purpose: str = "learn"


@dataclass(frozen=True)
class Session:
    """One call of ``train`` on the run.

    Attributes:
        began: day and time. start, stop: steps that were done before it, and after it; ``stop`` is None while it goes on, and where it
            was killed. seconds: of each phase. peak_mb: most memory of each phase, in MB. logged: seconds that the log told before it.
    """

    began: str
    start: int
    stop: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_mb: Mapping[str, float] = dataclasses.field(default_factory=dict)
    logged: float = 0.0


@dataclass(frozen=True)
class Record:
    """What ``job.json`` says.

    Attributes:
        model: the base as it was named. fingerprint: as ``store/fingerprint.py`` has it. packing: of the base while it was trained on.
        device, dtype, attention: where it was, the dtype of weights that were not packed, and the word for its attention.
        system: the system turn before every prompt, "" for none. date: the day that the chat template printed, "" if it prints none.
        template: SHA-256 of the chat template, "" if there is none.
        data: the files. settings: every setting of the job by the name of its flag. versions: of minilora, torch, transformers, python.
        sessions: oldest first. answers: ``{prompt, before}`` and, once the run has ended, ``after``, in the order of asking.
    """

    model: str
    fingerprint: Mapping[str, Any]
    packing: Packing
    device: str
    dtype: str
    attention: str
    system: str
    date: str
    template: str
    data: tuple[DataFile, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    sessions: tuple[Session, ...] = ()
    answers: tuple[Mapping[str, str], ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase, all sessions together."""
        return _merged(sum, [session.seconds for session in self.sessions])

    @property
    def peak_mb(self) -> dict[str, float]:
        """The most of each phase over all sessions."""
        return _merged(max, [session.peak_mb for session in self.sessions])

    @property
    def prompts(self) -> list[str]:
        """What was asked before training, oldest first."""
        return [answer["prompt"] for answer in self.answers]


def _merged(how: Any, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: how(part[name] for part in parts if name in part) for name in names}


# ---- to the disk and back


def write_record(folder: str | os.PathLike[str], record: Record) -> None:
    """Write ``job.json`` in one step. Raises ``WriteError``."""
    content = {"version": _VERSION, **dataclasses.asdict(record)}
    write_file(Path(folder) / RECORD_FILE, json.dumps(content, indent=1) + "\n")


def read_record(folder: str | os.PathLike[str]) -> Record | None:
    """What the run in a folder remembers, also of a checkpoint in it; None for a folder without ``job.json``: it is no run's.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or says what no job says.
    """
    place = Path(folder)
    refuse_path(place)
    if not (place / RECORD_FILE).exists() and _CHECKPOINT.fullmatch(place.name):
        place = place.parent
    path = place / RECORD_FILE
    raw = _bytes(path)
    try:
        return None if raw is None else _record(parse_json(raw))
    except (ValueError, MiniLoraError) as error:
        raise CheckpointError(
            f"{path}: damaged, or of a newer minilora ({error}); copy the file again, or remove it and give --model and what else it knew"
        ) from None


def _bytes(path: Path) -> bytearray | None:
    """The whole file; a pipe, a device and what is larger than any record are refused, and never waited for."""
    try:
        with closing(disk.used.open(path)) as file:
            if file.size > LONGEST_JSON:
                raise CheckpointError(f"{path}: {file.size:,} bytes; at most {LONGEST_JSON:,} are read; remove it")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: what the run remembers cannot be read ({error.strerror})") from None


def _record(content: dict[str, Any]) -> Record:
    """Every field checked. Raises ``ValueError`` in words."""
    version = content.pop("version", None)
    if type(version) is not int or version != _VERSION:
        raise ConfigError(f"its version is not {_VERSION}")
    _keys("the file", content, Record)
    parts = _object("packing", content["packing"], Packing)
    packing = Packing(**parts)
    for name in ("double_quant", "by_folder"):
        validate.flag(f"packing.{name}", parts[name])
    _plain("packing.quant", packing.quant)
    validate.whole("packing.blocksize", packing.blocksize, 32, 4096)
    if packing.levels != "":
        _digest("packing.levels", packing.levels)
    _place(content)
    if not is_fingerprint(content["fingerprint"]):
        raise ConfigError("fingerprint: none of a base model")
    check_date(content["date"])
    if content["template"] != "":
        _digest("template", content["template"])
    _words("versions", content["versions"])
    return Record(
        **content
        | {
            "packing": packing,
            "data": tuple(_data_file(entry) for entry in _list("data", content["data"])),
            "settings": _settings(content["settings"]),
            "sessions": tuple(_session(entry) for entry in _list("sessions", content["sessions"])),
            "answers": tuple(_answer(entry) for entry in _list("answers", content["answers"])),
        }
    )


def _place(content: Mapping[str, Any]) -> None:
    validate.text("model", content["model"])
    check_place(content["device"], content["dtype"], content["attention"])
    if content["dtype"] not in DTYPE_NAMES:
        raise ConfigError(f"dtype: wanted one of {', '.join(DTYPE_NAMES)}")
    _plain("attention", content["attention"])
    validate.whole_text("system", content["system"])


def _data_file(entry: Any) -> DataFile:
    file = DataFile(**_object("data", entry, DataFile))
    validate.text("data.path", file.path)
    _digest("data.sha256", file.sha256)
    validate.number("data.weight", file.weight, 0, _LONGEST)
    _plain("data.purpose", file.purpose)
    return file


def _session(entry: Any) -> Session:
    session = Session(**_object("sessions", entry, Session))
    validate.text("sessions.began", session.began)
    validate.whole("sessions.start", session.start, 0, _MOST)
    if session.stop is not None:
        validate.whole("sessions.stop", session.stop, 0, _MOST)
    validate.number("sessions.logged", session.logged, 0, _LONGEST)
    for name in ("seconds", "peak_mb"):
        for phase, value in _mapping(f"sessions.{name}", getattr(session, name)).items():
            validate.number(f"sessions.{name}.{phase}", value, 0, _LONGEST)
    return session


def _answer(entry: Any) -> dict[str, str]:
    _words("answers", entry)
    if not {"prompt", "before"} <= entry.keys() <= {"prompt", "before", "after"}:
        raise ConfigError("answers: wanted prompt, before and after")
    validate.whole_text("answers.prompt", entry["prompt"])
    return dict(entry)


def _settings(value: Any) -> dict[str, Any]:
    """Settings are for people and for what compares runs; those that a command goes by are checked."""
    settings = _mapping("settings", value)
    if "max_new_tokens" in settings:
        validate.whole("settings.max_new_tokens", settings["max_new_tokens"], 1)
    validate.texts("settings.prompts", settings.get("prompts", []))
    return settings


def _object(name: str, value: Any, kind: type) -> dict[str, Any]:
    content = _mapping(name, value)
    _keys(name, content, kind)
    return content


def _keys(name: str, content: Mapping[str, Any], kind: type) -> None:
    wanted = {entry.name for entry in dataclasses.fields(kind)}
    if odd := sorted(content.keys() ^ wanted):
        raise ConfigError(f"{name}: {odd[0][:60]!r} is missing, or not known")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: wanted an object")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{name}: wanted a list")
    return value


def _words(name: str, value: Any) -> None:
    if not all(isinstance(word, str) for word in _mapping(name, value).values()):
        raise ConfigError(f"{name}: wanted texts")


def _plain(name: str, value: Any) -> None:
    if not isinstance(value, str) or not validate.PLAIN.fullmatch(value):
        raise ConfigError(f"{name}: wanted a word")


def _digest(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ConfigError(f"{name}: wanted 64 hexadecimal digits")
