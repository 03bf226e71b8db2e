"""One fine-tuning job from model name to run folder: what ``minilora train`` and ``minilora demo`` do.

Look at the data, load, packing on the way, inject, ask, train, ask again, report. Everything a job leaves lies in its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from minilora.errors import ConfigError
from minilora.files.write import write_file
from minilora.hf.devices import choose, settled
from minilora.hf.generate import answers
from minilora.hf.load import resolve
from minilora.hf.packed import is_packed_folder
from minilora.job.described import described, formats, memory, report_settings
from minilora.job.examples import looked_at, way_of
from minilora.job.given import job_from
from minilora.job.lens import Shown
from minilora.job.loading import computing_with, load, prepare
from minilora.job.outcome import Outcome
from minilora.job.probed import keep_probe
from minilora.job.push import check_upload, push_run
from minilora.job.rehearsal import rehearse
from minilora.job.sessions import Phases, Sessions, data_files, new_record, packing_of
from minilora.job.settings import Job
from minilora.job.start import begin, saved_start
from minilora.job.told import rows_to_read, say_adapted, say_packed
from minilora.job.trackers import Trackers, refuse_missing
from minilora.report.inspect import parameter_table, spectra, update_ratios
from minilora.report.page import render
from minilora.training.guards import context_length
from minilora.training.left import claim
from minilora.training.loop import train
from minilora.training.offload import refuse_offload
from minilora.training.optim_choice import as_trained, refuse_optimizer
from minilora.training.processes import Processes, joined
from minilora.training.progress import Progress
from minilora.training.rows import Rows
from minilora.training.run_folder import RunFolder
from minilora.training.settings import TrainConfig
from minilora.training.sharding import in_turn

__all__ = ["Job", "Outcome", "fine_tune"]

_OF_DATA = (
    "eval_share",
    "system",
    "columns",
    "max_length",
    "truncate",
)  # settings that make other examples of the same files
_Say = Callable[[str], None]
_Watch = Callable[[dict[str, Any]], None]


def fine_tune(job: Job | None = None, say: _Say | None = None, watch: _Watch | None = None, **settings: Any) -> Outcome:
    """Fine-tune a model: what ``minilora train`` does. Under torchrun all processes call it alike.

    Args:
        job: what to do, if it is not said by ``settings``.
        say: gets a line for each phase. watch: gets every record of the loop. Without either, progress is shown on standard output.
        settings: the flags of ``minilora train`` by name (``model``, ``data``, ``out``, ``r``, ``steps`` ...), or ``lora`` and
            ``training`` as whole configs.

    Returns:
        The records and losses of the run, its answers, seconds, peak memory and folder.

    Raises:
        MiniLoraError: a device that is not there (before anything is read), bad data (before the model is loaded), a run that lies in
            ``out`` already, config, model or target, in one line; and as ``train``.
    """
    if job is not None and settings:
        raise ConfigError(
            f"{min(settings)}=: stands beside a job; wanted one of the two, or dataclasses.replace(job, ...)"
        )
    job = job_from(settings) if job is None else job
    refuse_missing(job.report_to)
    with joined() as processes, computing_with(job.threads):
        if say or watch or not processes.first:
            return _Going(job, processes, say or _silent, watch).run()
        with Progress(job.training.steps) as progress:
            return _Going(job, processes, progress.say, progress.watch, progress.begin).run()


def _silent(line: str) -> None:
    """What a process says that is not the first."""


class _Going:
    """A job while it goes. Each method is a phase, and what it finds out is kept for those behind it.

    Args:
        begun: called with the number of steps as soon as it is known: epochs are counted when the examples have been read.
    """

    def __init__(
        self,
        job: Job,
        processes: Processes,
        say: _Say,
        watch: _Watch | None,
        begun: Callable[[int], None] | None = None,
    ) -> None:
        self.processes, self.say, self.watch, self.begun = processes, say, watch, begun
        self.clock, self.folder = Phases(), Path(job.out)
        self.place = choose(job.device, job.dtype, job.attention)
        self.job = settled(job, self.place)

    def run(self) -> Outcome:
        """All of it, or all up to the first step."""
        self.look()
        self.load()
        self.adapt()
        if self.job.dry_run:
            with self.processes.exchange():
                rehearse(self.job, self.model, self.tokenizer, self.examples, self.evaluation, self.say)
            return Outcome([], [], self.clock.seconds, self.clock.peak_mb, self.folder)
        self.ask()
        outcome = self.train()
        self.prove()
        self.report(outcome)
        return outcome

    def look(self) -> None:
        """At the folder, the data and the adapter to begin with: what can be refused before a model is loaded."""
        job, processes = self.job, self.processes
        _refuse_on(self.place.device, job.training)
        if processes.first:
            if job.push_to_hub and not job.dry_run:
                self.say(f"{job.push_to_hub}: {check_upload(job.push_to_hub)} may write there")
            claim(self.folder, job.resume, job.overwrite)
        self.sessions = Sessions(self.folder, job.resume)
        self.looked = looked_at(job, self.say)
        self.job, self.stored = saved_start(job, processes)
        self.origin = self.stored.sha256 if self.stored else ""
        known = {"data file": self.looked.sha256, "adapter to begin with": self.origin}
        processes.agree(known | _settings_of_all(self.job))

    def load(self) -> None:
        """The examples, and then the model, packed on the way."""
        job, place = self.job, self.place
        found = prepare(job, place, self.looked, [job.lora], self.say)
        self.size = sum(p.numel() * p.element_size() for p in found.paper.parameters())
        self.template, self.tokenizer, self.date = found.template, found.tokenizer, found.date
        self.examples, self.evaluation = found.examples, found.evaluation
        self.way = way_of(job, self.tokenizer, context_length(found.paper))
        self.job = job = replace(job, training=job.training.for_examples(len(self.examples)))  # epochs become steps
        if self.begun:
            self.begun(job.training.steps)
        if job.shard and self.processes.size == 1:
            self.say("shard: this one process keeps the whole model; torchrun starts several, which share it")
        self.rows = None
        if job.shard and self.processes.size > 1:
            own = Rows(self.processes, place.dtype)
            self.rows = rows_to_read(job, found.paper, own, found.matches[0], self.say)
        self.model: Any = load(job, place, self.rows)
        self.clock.lap("load")

    def adapt(self) -> None:
        """The model gets its adapter; what it is packed to, what trains and what is covered is said."""
        say_packed(self.job, self.model, self.say)
        with self.processes.exchange():
            begin(self.job, self.model, self.stored, self.examples, self.tokenizer.pad_token_id, self.say)
            with as_trained(self.model, self.job.training):
                say_adapted(self.job, self.model, self.say)
        self.clock.lap("inject")

    def ask(self) -> None:
        """Before training: the model that is trained, packed if it is, so that training alone makes the difference."""
        job, model = self.job, self.model
        with as_trained(model, job.training):
            self.tables = {
                "parameters": parameter_table(model),
                "memory": memory(job, model),
                "formats": formats(model),
            }
        self.asks = self.processes.first or job.shard  # of a model in shards all must ask
        # The first process has the folder. A prompt that was asked in another way (--system) is asked anew.
        earlier, known = self.processes.share((self.sessions.prompts, self.sessions.known(job)))[0]
        self.prompts = list(dict.fromkeys([*earlier, *job.prompts]))
        new = [prompt for prompt in self.prompts if prompt not in known]
        if new:
            self.say(f"asking {len(new)} prompt{'s' * (len(new) > 1)} before training")
        asks_now = self.processes.first or self.rows is not None
        said = self.answered(new) if asks_now else [""] * len(new)
        self.before = known | dict(zip(new, said, strict=True))
        self.shown = Shown(self.examples, self.evaluation, self.tokenizer.pad_token_id)
        if asks_now:
            self.shown.ask(model, "before")
        self.clock.lap("answers before")

    def answered(self, prompts: list[str]) -> list[str]:
        """What the model says now."""
        return answers(self.model, self.tokenizer, prompts, self.job.max_new_tokens, system=self.job.system)

    def ready(self, here: RunFolder) -> None:
        """The first step comes next: the run folder gets its record."""
        first = [{"prompt": prompt, "before": self.before[prompt]} for prompt in self.prompts]
        packed = packing_of(self.model, is_packed_folder(resolve(self.job.model)))
        files = data_files(self.looked.learn, self.looked.held)
        record = new_record(self.job, here, packed, self.template, self.date, files, first)
        self.sessions.begin(here, record, self.clock)

    def train(self) -> Outcome:
        """Step by step, and then the same questions again."""
        job, folder, pad = self.job, self.folder, self.tokenizer.pad_token_id
        trackers = Trackers(job.report_to if self.processes.first else (), folder, report_settings(job), self.say)

        def tell(record: dict[str, Any]) -> None:
            trackers.log(record)
            if self.watch:
                self.watch(record)

        def sample() -> tuple[str, str]:
            return self.prompts[0], self.answered(self.prompts[:1])[0]

        options: dict[str, Any] = {"resume": job.resume, "overwrite": job.overwrite, "shard": job.shard}
        options |= {"say": self.say, "origin": self.origin, "ready": self.ready}
        options["notes"] = {name: str(getattr(job, name)) for name in _OF_DATA} | (
            {"date": self.date} if self.date else {}
        )
        asked = sample if self.prompts else None
        with self.sessions.closed_by(self.clock):
            try:
                steps = train(
                    self.model, self.examples, job.training, folder, pad, self.evaluation, asked, tell, **options
                )
            finally:
                trackers.finish()
            self.clock.lap("train")
            after = self.answered(self.prompts) if self.asks else []
            if self.asks:
                self.shown.ask(self.model, "after")
            self.clock.lap("answers after")
            pairs = [
                {"prompt": prompt, "before": self.before[prompt], "after": answer}
                for prompt, answer in zip(self.prompts, after, strict=False)
            ]
            self.sessions.answers = pairs
        return Outcome(steps, pairs, *self.sessions.totals(self.clock), folder, self.sessions.count)

    def prove(self) -> None:
        """What base and adapted model say to a few prompts, for ``minilora verify``; a model in shards is sealed later."""
        if self.job.probe and self.processes.first and self.rows is None and not self.job.shard:
            keep_probe(self.job, self.model, self.tokenizer, self.prompts, self.template, self.folder, self.say)

    def report(self, outcome: Outcome) -> None:
        """The page, written by the first process, and the upload."""
        job, model = self.job, self.model
        with in_turn(model) as around:
            ratios = update_ratios(model, around=around) if self.asks else {}
            values = spectra(model, ratios=ratios, around=around) if self.asks else {}
        if self.processes.first:
            told = described(job, outcome, self.size, self.tables, ratios, values)
            lenses = self.shown.pictured((*self.looked.learn, *self.looked.held), self.tokenizer, self.way)
            page = render(told | {"lenses": lenses})
            write_file(self.folder / "report.html", page)
            if job.push_to_hub:
                self.say(f"{self.folder}: now at {push_run(self.folder, job.push_to_hub, job.private or None)}")


def _refuse_on(device: torch.device, config: TrainConfig) -> None:
    """Raise what ``train`` would raise of the device, now and not after the model is loaded: an optimizer or a memory that it lacks."""
    refuse_optimizer(config, device)
    if config.offload != "none":
        refuse_offload(device)


def _settings_of_all(job: Job) -> dict[str, str]:
    """What must be the same in all processes of a job; what is compared later, and what a machine may call otherwise, is left out."""
    own = {"model", "data", "eval_data", "out", "device", "lora"}
    return {entry.name: repr(getattr(job, entry.name)) for entry in fields(job) if entry.name not in own}
