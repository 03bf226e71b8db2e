"""The sessions of a run, as its record keeps them: what was there before, what this one begins with, and what it leaves.

A session that is interrupted is closed as it ends; one that was killed is closed by the next, from the log. Next file: ``job/finetune.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minilora.data.records import Source
from minilora.errors import MiniLoraError
from minilora.hf.versions import versions
from minilora.job.record import RECORD_FILE, DataFile, Packing, Record, Session, read_record, write_record
from minilora.job.settings import Job
from minilora.linear.frozen import PackedLinear
from minilora.training.checkpoint import steps
from minilora.training.left import kept_records
from minilora.training.memory import memory_mb, new_peak
from minilora.training.run_folder import RunFolder

__all__ = ["Phases", "Sessions", "data_files", "new_record", "packing_of", "settings_of", "template_sha256"]


def packing_of(model: Any, by_folder: bool = False) -> Packing:
    """How the linear layers of a model in memory are packed."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not packed:
        return Packing("none")
    known = {module.format: _table(module) for module in packed}
    tables = repr([known[name] for name in sorted(known)])
    return Packing(
        "-".join(sorted(known)),
        any(getattr(module, "double_quant", False) for module in packed),
        by_folder,
        max(module.quantized().unit for module in packed),
        hashlib.sha256(tables.encode()).hexdigest(),
    )


def _table(layer: Any) -> tuple[Any, ...]:
    """A format's name and, where it has a table, what is in it."""
    book = getattr(layer, "book", None)
    return (layer.format,) if book is None else (book.name, book.signed, book.table().tolist())


def template_sha256(tokenizer: Any) -> str:
    """The SHA-256 of a tokenizer's chat template as it was read, "" if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def settings_of(job: Job) -> dict[str, Any]:
    """Every setting of a job by the name of its flag, as JSON; not those that say what to do with an earlier run."""
    apart = ("lora", "training", "resume", "overwrite")
    own = {entry.name: getattr(job, entry.name) for entry in dataclasses.fields(Job) if entry.name not in apart}
    every = own | job.lora.to_dict() | dataclasses.asdict(job.training)
    return json.loads(json.dumps(every))


def data_files(learn: Sequence[Source], held: Sequence[Source]) -> tuple[DataFile, ...]:
    """The files that the examples come from."""
    every = [(source, "learn") for source in learn] + [(source, "evaluate") for source in held]
    return tuple(DataFile(source.name, source.sha256, source.weight, purpose) for source, purpose in every)


class Phases:
    """Seconds of each phase, in order, and the most memory in it, in MB."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mb: dict[str, float] = {}
        self._last = time.monotonic()
        new_peak()

    def lap(self, name: str) -> None:
        """A phase ends."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), memory_mb(peak=True))
        self._last = now
        new_peak()


def new_record(
    job: Job,
    here: RunFolder,
    packing: Packing,
    template: str,
    date: str,
    data: tuple[DataFile, ...],
    answers: Sequence[Mapping[str, str]],
) -> Record:
    """The record of a job that is ready for its first step: ``answers`` with prompt and before."""
    return Record(
        model=job.model,
        fingerprint=here.meaning["base"],
        packing=packing,
        device=job.device,
        dtype=job.dtype,
        attention=job.attention,
        system=job.system,
        date=date,
        template=template,
        data=data,
        settings=settings_of(job),
        versions=versions(),
        answers=tuple(answers),
    )


class Sessions:
    """The record of a run while one more session of it goes.

    Attributes:
        past: what was there before, or None. record: with this session in it, once it has begun. answers: after training, once there.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        """Raises ``CheckpointError`` for a record that is damaged, before anything is loaded."""
        self.folder, self.began = folder, time.strftime("%Y-%m-%dT%H:%M:%S")
        self.past = _closed(read_record(folder), folder) if resume else None
        self.record: Record | None = None
        self.answers: Sequence[Mapping[str, str]] = ()
        self._here: RunFolder | None = None

    @property
    def prompts(self) -> list[str]:
        """What earlier sessions were asked, oldest first."""
        return self.past.prompts if self.past else []

    def known(self, job: Job) -> dict[str, str]:
        """The answers before training that an earlier session was given, by prompt, if the model would give them again."""
        past = self.past
        if past is None or not steps(
            self.folder
        ):  # without a checkpoint the run begins anew, perhaps with another model
            return {}
        alike = past.system == job.system
        alike = alike and past.settings.get("max_new_tokens") == job.max_new_tokens
        return {answer["prompt"]: answer["before"] for answer in past.answers} if alike else {}

    def begin(self, here: RunFolder, record: Record, spent: Phases) -> None:
        """The first step comes next: write down what is known."""
        told = max((line["seconds"] for line in here.records if "seconds" in line), default=0.0)
        session = Session(self.began, here.step, None, dict(spent.seconds), dict(spent.peak_mb), told)
        earlier = self.past.sessions if self.past else ()
        if not earlier and here.step:  # of a minilora that kept no record; the log has its time
            earlier = (Session("unknown", 0, here.step, {"train": told}),)
        self._here, self.record = here, dataclasses.replace(record, sessions=(*earlier, session))
        write_record(self.folder, self.record)

    @property
    def count(self) -> int:
        """How many sessions the run has had, with this one."""
        return len(self.record.sessions) if self.record else 1

    def totals(self, spent: Phases) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Seconds and most memory of each phase over all sessions; of this one alone where another process writes."""
        told = self.record or spent
        return told.seconds, told.peak_mb

    @contextmanager
    def closed_by(self, spent: Phases) -> Iterator[None]:
        """Write down how far the session came, however it ends; of one that is killed the log tells as much."""
        try:
            yield
        except MiniLoraError:
            spent.lap("train")
            with suppress(MiniLoraError):
                self._close(spent)
            raise
        self._close(spent)

    def _close(self, spent: Phases) -> None:
        if self.record is None or self._here is None:  # it has not begun, or another process writes
            return
        if not (self.folder / RECORD_FILE).exists():  # the first step refused the run, and nothing of it stays
            return
        *earlier, last = self.record.sessions
        last = dataclasses.replace(last, stop=self._here.step, seconds=dict(spent.seconds), peak_mb=dict(spent.peak_mb))
        answers = tuple(self.answers) or self.record.answers
        self.record = dataclasses.replace(self.record, sessions=(*earlier, last), answers=answers)
        write_record(self.folder, self.record)


def _closed(past: Record | None, folder: Path) -> Record | None:
    """The record, with what the log says of a last session that nobody closed."""
    if past is None or not past.sessions or past.sessions[-1].stop is not None:
        return past
    last, lines = past.sessions[-1], kept_records(folder)
    told = max((line["seconds"] for line in lines if "seconds" in line), default=last.logged)
    reached = max((line["step"] for line in lines), default=last.start)
    seconds = {**last.seconds, "train": max(0.0, told - last.logged)}
    closed = dataclasses.replace(last, stop=max(last.start, reached), seconds=seconds)
    return dataclasses.replace(past, sessions=(*past.sessions[:-1], closed))
