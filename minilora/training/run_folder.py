"""The folder of a run while it goes: its log, its checkpoints and, at the end, the adapter; and where the run is.

The first process alone writes. A checkpoint is of the last good state: after a step that was skipped, or one that broke, that is an
earlier one. Next file: ``training/endings.py``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import CheckpointError, MiniLoraError
from minilora.files.write import append_line, remove, write_file, write_files
from minilora.store.save import adapter_files
from minilora.training.best import Best, fetch
from minilora.training.checkpoint import ENDS, prune, save_checkpoint, with_more_steps
from minilora.training.left import LOG_FILE, RECORD_FILE, kept_records
from minilora.training.processes import Processes
from minilora.training.resume import newest, put_weights, restore
from minilora.training.together import refuse_apart

__all__ = ["RunFolder"]


@dataclass
class RunFolder:
    """What of a run lies on disk, and how far it is.

    Attributes:
        named: the parameters that train. adapter: the name of the one that they belong to. meaning: as ``meaning.meaning``.
        keep: newest checkpoints that stay. watch: called with every record. base: what the adapter's file says of the base model, where
            that cannot be read later.
        step: steps that are done. good: steps that were done when the weights changed last. saved: the step of the last checkpoint.
        best: the evaluations so far, and what follows from them.
        whole: whether no change of the weights is half done. records: what was logged. begin: when the run began (``time.monotonic``).
    """

    path: Path
    model: nn.Module
    adapter: str
    named: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    meaning: Mapping[str, Any]
    keep: int
    best: Best
    processes: Processes
    say: Callable[[str], None]
    watch: Callable[[dict[str, Any]], None] | None
    base: Any = None
    step: int = 0
    good: int = 0
    saved: int = 0
    whole: bool = True
    records: list[dict[str, Any]] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def go_on(self) -> str:
        """Take up the newest checkpoint; returns where the run goes on, in words."""
        processes = self.processes
        found = newest(self.path, self.say, processes)
        if found is None:
            return "no checkpoint yet: from the start"
        self.best.take_up(found.evaluations)
        if self.best.spare:
            fetch(self.path, self.best.spare, processes)  # refused now, and not at the end
        self.meaning = with_more_steps(self.meaning, found)
        restore(self.model, self.adapter, self.named, self.optimizer, found, self.meaning, self.say)
        self.step = self.good = self.saved = found.step
        self.records = kept_records(self.path, found.step, processes, found.owner)
        if processes.first:
            prune(self.path, self.keep, self.best.spare)
        self.begin -= max((record["seconds"] for record in self.records if "seconds" in record), default=0.0)
        where = f", which {processes.name(found.owner)} has" if found.owner else ""
        return f"going on after step {found.step}: {found.path}{where}"

    @property
    def schedule_begin(self) -> int:
        """The step after which the schedule began: not 0 where a finished run went on with more steps."""
        ends = self.meaning["training"].get(ENDS, [])
        return ends[-1] if ends else 0

    def open_log(self) -> None:
        """Begin the log; it says no more than what is done."""
        if self.processes.first:
            write_file(self.path / LOG_FILE, "".join(f"{json.dumps(record)}\n" for record in self.records))

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its parts."""
        return time.monotonic() - self.begin

    def log(self, record: dict[str, Any]) -> None:
        """A line more in the log."""
        self.records.append(record)
        if self.processes.first:
            append_line(self.path / LOG_FILE, json.dumps(record))
            if self.watch:
                self.watch(record)

    def save(self) -> str:
        """Make sure that there is a checkpoint of the last good state; returns where, in words."""
        if not self.good:
            return "nothing was learnt yet, so nothing is saved"
        if not self.whole:
            return f"it broke while the weights changed, so {f'checkpoint-{self.saved}' if self.saved else 'nothing'} is what is saved"
        if self.saved != self.good:
            if self.processes.first:
                state = (self.model, self.adapter, self.named, self.optimizer)
                kept = (self.best.up_to(self.good), self.best.spare)
                save_checkpoint(*state, self.path, self.good, self.meaning, self.keep, self.base, *kept)
            self.saved = self.good
        return f"saved in {self.path / f'checkpoint-{self.good}'}"

    def leave_nothing(self) -> None:
        """A run that has not begun leaves no log, and no record."""
        if self.processes.first:
            names = (LOG_FILE, RECORD_FILE)
            remove(self.path, [name for name in names if os.path.lexists(self.path / name)])

    def refuse_apart(self) -> None:
        """Raise ``TrainingError`` on all where the adapters of the processes have come apart."""
        refuse_apart(self.processes, self.model, self.adapter, self.step, self.saved)

    def finish(self) -> None:
        """Write the adapter, of the last step or of the lowest evaluation loss, and the checkpoint with which the run can go on."""
        self.refuse_apart()
        lowest = self.best.lowest
        try:
            self.save()  # of the last step, whichever becomes the adapter
        except MiniLoraError as error:  # the adapter is what the run was for
            self.say(f"no checkpoint of the last step, so the run cannot go on with more: {error}")
        if self.best.spare and lowest is not None and lowest.loss is not None:
            try:
                best = fetch(self.path, lowest.good, self.processes)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; the last state: {self.save()}") from None
            put_weights(self.model, self.adapter, best.weights)
            self.say(f"the adapter is that of step {lowest.step}, of the lowest evaluation loss: {lowest.loss:.4f}")
        self.model.eval()
        if self.processes.first:
            write_files(self.path, adapter_files(self.model, self.adapter, base=self.base))
