"""One fine-tuning job from model name to run folder: what ``minilora train`` and ``minilora demo`` do.

Load, packing on the way, inject, ask, train, ask again, report. Everything a job leaves lies in its folder.
"""

from __future__ import annotations

from collections.abc import Callable
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
from minilora.job.described import described, formats, memory
from minilora.job.examples import encoded
from minilora.job.given import job_from
from minilora.job.outcome import Outcome
from minilora.job.push import check_upload, push_run
from minilora.job.sessions import Phases, Sessions, data_files, new_record, packing_of, template_sha256
from minilora.job.settings import Job
from minilora.lora.coverage import coverage
from minilora.lora.inject import inject
from minilora.lora.match import Match, match
from minilora.many.adapted import count_parameters
from minilora.report.inspect import parameter_table, spectra, update_ratios
from minilora.report.page import render
from minilora.training.guards import context_length
from minilora.training.loop import train
from minilora.training.processes import Processes, joined
from minilora.training.progress import Progress, busy
from minilora.training.resume import claim
from minilora.training.rows import Rows, why_read_whole
from minilora.training.run_folder import RunFolder
from minilora.training.sharding import in_turn

__all__ = ["Job", "Outcome", "fine_tune"]


def fine_tune(
    job: Job | None = None,
    say: Callable[[str], None] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Outcome:
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
    with joined() as processes:
        if say or watch:
            return _fine_tune(job, say or (lambda line: None), watch, processes)
        if not processes.first:
            return _fine_tune(job, lambda line: None, None, processes)
        with Progress(job.training.steps) as progress:
            return _fine_tune(job, progress.say, progress.watch, processes)


def _fine_tune(
    job: Job, say: Callable[[str], None], watch: Callable[[dict[str, Any]], None] | None, processes: Processes
) -> Outcome:
    clock, folder = Phases(), Path(job.out)
    place = choose(job.device, job.dtype, job.attention)
    job = settled(job, place)
    if processes.first:
        if job.push_to_hub:
            say(f"{job.push_to_hub}: {check_upload(job.push_to_hub)} may write there")
        claim(folder, job.resume, job.overwrite)
    sessions = Sessions(folder, job.resume)
    source = look_at(job.data)
    processes.agree({"data file": source.sha256})  # before a model is loaded
    trust, quant = job.trust_remote_code, packing(job.quant, job.double_quant)
    paper = skeleton(job.model, place.dtype, trust)
    found = match(
        paper, job.lora
    )  # a mistyped target shows now, before any weight is read, and so does every line of the data
    size = sum(p.numel() * p.element_size() for p in paper.parameters())
    say(f"{source.records} examples in {job.data}; loading {job.model} on {place.said}")
    tokenizer = load_tokenizer(job.model, trust)
    template = template_sha256(tokenizer)
    tokenizer = dated(tokenizer, job.date)
    examples, evaluation = encoded(job, source, tokenizer, context_length(paper), say)
    rows = _rows(job, paper, Rows(processes, place.dtype), found, say) if job.shard and processes.size > 1 else None
    options: dict[str, Any] = {"device": place.device, "quant": quant, "attention": job.attention, "rows": rows}
    with busy(f"loading {job.model}"):
        model = load_model(job.model, place.dtype, trust, **options)
    clock.lap("load")
    with processes.exchange():
        model = _adapted(job, model, say)
    clock.lap("inject")
    known = processes.share(sessions.known(job))[0]  # the first process has the folder
    prompts = list(dict.fromkeys([*known, *job.prompts]))
    new = [prompt for prompt in prompts if prompt not in known]
    if new:  # of the model that is trained, packed if it is, so that training alone makes the difference
        say(f"asking {len(new)} prompts before training")
    tables = {"parameters": parameter_table(model), "memory": memory(job, model), "formats": formats(model)}
    asks = processes.first or job.shard  # of a model in shards all must ask
    asks_now = processes.first or rows is not None
    asking: dict[str, Any] = {"max_new_tokens": job.max_new_tokens, "system": getattr(job, "system", "")}
    said = answers(model, tokenizer, new, **asking) if asks_now else [""] * len(new)
    before = known | dict(zip(new, said, strict=True))
    clock.lap("answers before")

    def sample() -> tuple[str, str]:
        return prompts[0], answers(model, tokenizer, prompts[:1], **asking)[0]

    def ready(here: RunFolder) -> None:
        first = [{"prompt": prompt, "before": before[prompt]} for prompt in prompts]
        date, packed = date_of(tokenizer, job.date), packing_of(model, is_packed_folder(resolve(job.model)))
        sessions.begin(here, new_record(job, here, packed, template, date, data_files(source), first), clock)

    asked, pad = (sample if prompts else None), tokenizer.pad_token_id
    options = {"resume": job.resume, "overwrite": job.overwrite, "say": say, "shard": job.shard, "ready": ready}
    options["notes"] = {"date": date} if (date := date_of(tokenizer, job.date)) else {}
    with sessions.closed_by(clock):
        steps = train(model, examples, job.training, folder, pad, evaluation, asked, watch, **options)
        clock.lap("train")
        after = answers(model, tokenizer, prompts, **asking) if asks else []
        clock.lap("answers after")
        pairs = [{"prompt": p, "before": before[p], "after": a} for p, a in zip(prompts, after, strict=False)]
        sessions.answers = pairs
    outcome = Outcome(steps, pairs, *sessions.totals(clock), folder, sessions.count)
    with in_turn(model) as around:
        ratios = update_ratios(model, around=around) if asks else {}
        values = spectra(model, ratios=ratios, around=around) if asks else {}
    if processes.first:
        write_file(folder / "report.html", render(described(job, outcome, size, tables, ratios, values)))
        if job.push_to_hub:
            say(f"{folder}: now at {push_run(folder, job.push_to_hub, job.private or None)}")
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
