"""One fine-tuning job from model name to run folder: what ``minilora train`` and ``minilora demo`` do.

Load, packing on the way, inject, ask, train, ask again, report. Everything a job leaves lies in its folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from minilora.data.records import look_at
from minilora.errors import ConfigError
from minilora.files.write import write_file
from minilora.hf.dates import date_of, dated
from minilora.hf.devices import choose, settled
from minilora.hf.generate import answers
from minilora.hf.load import load_model, load_tokenizer, resolve, skeleton
from minilora.hf.packed import is_packed_folder
from minilora.hf.places import packing
from minilora.job.described import described, formats, memory, settings_of
from minilora.job.examples import encoded
from minilora.job.outcome import Outcome
from minilora.job.rehearsal import rehearse
from minilora.job.settings import Job
from minilora.job.start import begin, saved_start
from minilora.job.trackers import Trackers, refuse_missing
from minilora.lora.coverage import coverage
from minilora.lora.match import Match, match
from minilora.many.adapted import count_parameters
from minilora.report.inspect import parameter_table, spectra, update_ratios
from minilora.report.page import render
from minilora.training.guards import context_length
from minilora.training.loop import train
from minilora.training.memory import memory_mb
from minilora.training.offload import refuse_offload
from minilora.training.optim import make_optimizer
from minilora.training.processes import Processes, joined
from minilora.training.resume import claim
from minilora.training.rows import Rows, why_read_whole
from minilora.training.settings import TrainConfig
from minilora.training.sharding import in_turn

__all__ = ["Job", "Outcome", "fine_tune"]


def fine_tune(
    job: Job,
    say: Callable[[str], None] = print,
    watch: Callable[[dict[str, Any]], None] | None = None,
    begun: Callable[[int], None] | None = None,
) -> Outcome:
    """Run a job; ``say`` gets a line for each phase, ``watch`` every record of the loop. Under torchrun all processes call it alike.

    ``begun`` is called with the number of steps as soon as it is known: epochs are counted when the examples have been read.

    Raises:
        MiniLoraError: a device that is not there (before anything is read), bad data (before the model is loaded), a run that lies in
            ``out`` already, config, model or target, in one line; and as ``train``.
    """
    refuse_missing(job.report_to)
    with joined() as processes, computing_with(job.threads):
        return _fine_tune(job, say, watch, begun, processes)


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """So many threads of torch until the end of the block; 0 leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fine_tune(
    job: Job,
    say: Callable[[str], None],
    watch: Callable[[dict[str, Any]], None] | None,
    begun: Callable[[int], None] | None,
    processes: Processes,
) -> Outcome:
    clock, folder = _Clock(), Path(job.out)
    place = choose(job.device, job.dtype, job.attention)
    job = settled(job, place)
    _refuse_on(place.device, job.training)
    if processes.first:
        claim(folder, job.resume, job.overwrite)
    source = look_at(job.data)
    job, stored = saved_start(job, processes)
    origin = stored.sha256 if stored else ""
    known = {"data file": source.sha256, "adapter to begin with": origin}
    processes.agree(known | _settings_of_all(job))  # before a model is loaded
    trust, quant = job.trust_remote_code, packing(job.quant, job.double_quant)
    paper = skeleton(job.model, place.dtype, trust)
    found = match(
        paper, job.lora
    )  # a mistyped target shows now, before any weight is read, and so does every line of the data
    size = sum(p.numel() * p.element_size() for p in paper.parameters())
    say(f"{source.records} examples in {job.data}; loading {job.model} on {place.said}")
    tokenizer = dated(load_tokenizer(job.model, trust), job.date)
    examples, evaluation = encoded(job, source, tokenizer, context_length(paper), say)
    job = replace(job, training=job.training.for_examples(len(examples)))  # epochs become steps
    if begun:
        begun(job.training.steps)
    if job.shard and processes.size == 1:
        say("shard: this one process keeps the whole model; torchrun starts several, which share it")
    rows = _rows(job, paper, Rows(processes, place.dtype), found, say) if job.shard and processes.size > 1 else None
    options: dict[str, Any] = {"device": place.device, "quant": quant, "attention": job.attention, "rows": rows}
    model = load_model(job.model, place.dtype, trust, **options)
    clock.lap("load")
    _say_packed(job, model, say)
    with processes.exchange():
        begin(job, model, stored, examples, tokenizer.pad_token_id, say)
        _say_adapted(job, model, say)
    clock.lap("inject")
    if job.dry_run:
        with processes.exchange():
            rehearse(job, model, tokenizer, examples, evaluation, say)
        return Outcome([], [], clock.laps, memory_mb(peak=True), folder)
    if job.prompts:  # of the model that is trained, packed if it is, so that training alone makes the difference
        say(f"asking {len(job.prompts)} prompt{'s' * (len(job.prompts) > 1)} before training")
    tables = {"parameters": parameter_table(model), "memory": memory(job, model), "formats": formats(model)}
    asks = processes.first or job.shard  # of a model in shards all must ask
    asks_now = processes.first or rows is not None
    before = answers(model, tokenizer, job.prompts, job.max_new_tokens) if asks_now else []
    clock.lap("answers before")

    def sample() -> tuple[str, str]:
        return job.prompts[0], answers(model, tokenizer, job.prompts[:1], job.max_new_tokens)[0]

    asked, pad = (sample if job.prompts else None), tokenizer.pad_token_id
    options = {"resume": job.resume, "overwrite": job.overwrite, "say": say, "shard": job.shard, "origin": origin}
    options["notes"] = {"date": date} if (date := date_of(tokenizer, job.date)) else {}
    trackers = Trackers(job.report_to if processes.first else (), folder, settings_of(job), say)

    def tell(record: dict[str, Any]) -> None:
        trackers.log(record)
        if watch:
            watch(record)

    try:
        steps = train(model, examples, job.training, folder, pad, evaluation, asked, tell, **options)
    finally:
        trackers.finish()
    clock.lap("train")
    after = answers(model, tokenizer, job.prompts, job.max_new_tokens) if asks else []
    clock.lap("answers after")
    pairs = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(job.prompts, before, after, strict=False)]
    outcome = Outcome(steps, pairs, clock.laps, memory_mb(peak=True), folder)
    with in_turn(model) as around:
        ratios = update_ratios(model, around=around) if asks else {}
        values = spectra(model, ratios=ratios, around=around) if asks else {}
    if processes.first:
        write_file(folder / "report.html", render(described(job, outcome, size, tables, ratios, values)))
    return outcome


def _refuse_on(device: torch.device, config: TrainConfig) -> None:
    """Raise what ``train`` would raise of the device, now and not after the model is loaded: an optimizer or a memory that it lacks."""
    make_optimizer(config, [torch.nn.Parameter(torch.zeros(1, device=device))])
    if config.offload != "none":
        refuse_offload(device)


def _settings_of_all(job: Job) -> dict[str, str]:
    """What must be the same in all processes of a job; what is compared later, and what a machine may call otherwise, is left out."""
    own = {"model", "data", "out", "device", "lora"}
    return {entry.name: repr(getattr(job, entry.name)) for entry in fields(job) if entry.name not in own}


def _rows(job: Job, paper: Any, rows: Rows, found: Match, say: Callable[[str], None]) -> Rows | None:
    """The rows to keep of the model while it is read; None where all of it must be at hand before it is shared out, which is said."""
    why = why_read_whole(paper, job.lora, found)
    if why is None and hasattr(paper.config, "quantization_config") and not is_packed_folder(resolve(job.model)):
        why = f"{job.model} was packed by another method"
    if why is None:
        return rows
    say(f"shard: each process reads the whole model before it keeps its part, because {why}")
    return None


def _say_packed(job: Job, model: Any, say: Callable[[str], None]) -> None:
    """What the model is packed to. Raises ``ConfigError`` where it came packed to something else."""
    found, nested = formats(model), ", double quantization" if job.double_quant else ""
    if is_packed_folder(resolve(job.model)):
        if job.quant not in ("none", Job.quant, found):
            raise ConfigError(
                f"quant={job.quant!r}: {job.model} is packed as {found} already; leave it out, or name the dense model"
            )
        say(f"{job.model} is packed already ({found}), and stays as it is")
    elif found:
        say(f"linear layers packed to {job.quant}{nested} (--quant none keeps them as they are)")


def _say_adapted(job: Job, model: Any, say: Callable[[str], None]) -> None:
    """What trains, and which layers it covers."""
    trainable, total = count_parameters(model)
    say(f"training {trainable:,} of {total:,} parameters for {job.training.steps} steps")
    covered, others = coverage(model)
    left = sorted({path.rsplit(".", 1)[-1] for path in others})
    rest = f"; not {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}" if left else ""
    say(f"the adapter covers {len(covered)} of {len(covered) + len(others)} linear layers and convolutions{rest}")


class _Clock:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
