"""One fine-tuning job from model name to run folder: what ``minilora train`` and ``minilora demo`` do.

Load, packing on the way, inject, ask, train, ask again, report. Everything a job leaves lies in its folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minilora.errors import ConfigError
from minilora.files.write import write_file
from minilora.hf.dates import date_of, dated
from minilora.hf.devices import choose, settled
from minilora.hf.generate import answers
from minilora.hf.load import load_model, load_tokenizer, resolve, skeleton
from minilora.hf.packed import is_packed_folder
from minilora.hf.places import packing
from minilora.job.described import described, formats, memory
from minilora.job.examples import encoded, looked_at
from minilora.job.outcome import Outcome
from minilora.job.settings import Job
from minilora.lora.coverage import coverage
from minilora.lora.inject import inject
from minilora.lora.match import Match, match
from minilora.many.adapted import count_parameters
from minilora.report.inspect import parameter_table, spectra, update_ratios
from minilora.report.page import render
from minilora.training.guards import context_length
from minilora.training.loop import train
from minilora.training.memory import memory_mb
from minilora.training.processes import Processes, joined
from minilora.training.resume import claim
from minilora.training.rows import Rows, why_read_whole
from minilora.training.sharding import in_turn

__all__ = ["Job", "Outcome", "fine_tune"]


def fine_tune(
    job: Job, say: Callable[[str], None] = print, watch: Callable[[dict[str, Any]], None] | None = None
) -> Outcome:
    """Run a job; ``say`` gets a line for each phase, ``watch`` every record of the loop. Under torchrun all processes call it alike.

    Raises:
        MiniLoraError: a device that is not there (before anything is read), bad data (before the model is loaded), a run that lies in
            ``out`` already, config, model or target, in one line; and as ``train``.
    """
    with joined() as processes:
        return _fine_tune(job, say, watch, processes)


def _fine_tune(
    job: Job, say: Callable[[str], None], watch: Callable[[dict[str, Any]], None] | None, processes: Processes
) -> Outcome:
    clock, folder = _Clock(), Path(job.out)
    place = choose(job.device, job.dtype, job.attention)
    job = settled(job, place)
    if processes.first:
        claim(folder, job.resume, job.overwrite)
    looked = looked_at(job, say)
    processes.agree({"data file": looked.sha256})  # before a model is loaded
    trust, quant = job.trust_remote_code, packing(job.quant, job.double_quant)
    paper = skeleton(job.model, place.dtype, trust)
    found = match(
        paper, job.lora
    )  # a mistyped target shows now, before any weight is read, and so does every line of the data
    size = sum(p.numel() * p.element_size() for p in paper.parameters())
    say(f"{looked.said}; loading {job.model} on {place.said}")
    tokenizer = dated(load_tokenizer(job.model, trust), job.date)
    examples, evaluation = encoded(job, looked, tokenizer, context_length(paper), say)
    rows = _rows(job, paper, Rows(processes, place.dtype), found, say) if job.shard and processes.size > 1 else None
    options: dict[str, Any] = {"device": place.device, "quant": quant, "attention": job.attention, "rows": rows}
    model = load_model(job.model, place.dtype, trust, **options)
    clock.lap("load")
    with processes.exchange():
        model = _adapted(job, model, say)
    clock.lap("inject")
    if job.prompts:  # of the model that is trained, packed if it is, so that training alone makes the difference
        say(f"asking {len(job.prompts)} prompts before training")
    tables = {"parameters": parameter_table(model), "memory": memory(job, model), "formats": formats(model)}
    asks = processes.first or job.shard  # of a model in shards all must ask
    asks_now = processes.first or rows is not None
    before = answers(model, tokenizer, job.prompts, job.max_new_tokens) if asks_now else []
    clock.lap("answers before")

    def sample() -> tuple[str, str]:
        return job.prompts[0], answers(model, tokenizer, job.prompts[:1], job.max_new_tokens)[0]

    asked, pad = (sample if job.prompts else None), tokenizer.pad_token_id
    options = {"resume": job.resume, "overwrite": job.overwrite, "say": say, "shard": job.shard}
    options["notes"] = {"date": date} if (date := date_of(tokenizer, job.date)) else {}
    steps = train(model, examples, job.training, folder, pad, evaluation, asked, watch, **options)
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


def _rows(job: Job, paper: Any, rows: Rows, found: Match, say: Callable[[str], None]) -> Rows | None:
    """The rows to keep of the model while it is read; None where all of it must be at hand before it is shared out, which is said."""
    why = why_read_whole(paper, job.lora, found)
    if why is None and hasattr(paper.config, "quantization_config") and not is_packed_folder(resolve(job.model)):
        why = f"{job.model} was packed by another method"
    if why is None:
        return rows
    say(f"shard: each process reads the whole model before it keeps its part, because {why}")
    return None


def _adapted(job: Job, model: Any, say: Callable[[str], None]) -> Any:
    """The model with a fresh adapter; what it is packed to is said."""
    found, nested = formats(model), ", double quantization" if job.double_quant else ""
    if is_packed_folder(resolve(job.model)):
        if job.quant not in ("none", Job.quant, found):
            raise ConfigError(
                f"quant={job.quant!r}: {job.model} is packed as {found} already; leave it out, or name the dense model"
            )
        say(f"{job.model} is packed already ({found}), and stays as it is")
    elif found:
        say(f"linear layers packed to {job.quant}{nested}; quant=none keeps them as they are")
    # Adapters start from torch's generator, and a seed means the same adapter whatever ran before it.
    torch.manual_seed(job.training.seed)
    with in_turn(model) as around:
        inject(model, job.lora, around=around)
    trainable, total = count_parameters(model)
    say(f"training {trainable:,} of {total:,} parameters for {job.training.steps} steps")
    covered, others = coverage(model)
    left = sorted({path.rsplit(".", 1)[-1] for path in others})
    rest = f"; not {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}" if left else ""
    say(f"the adapter covers {len(covered)} of {len(covered) + len(others)} linear layers and convolutions{rest}")
    return model


class _Clock:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
