"""Run the same fine-tuning job in minilora and in PEFT, step by step in turns, each in a process of its own.

Turns, so that whatever else the machine does meets both alike; own processes, so that neither pays for the other's memory. The other
library's side is ``peers.py``, which uses ``contestant`` from here: loading differs, the step does not.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora import __version__
from minilora.data.encoding import encode_all
from minilora.data.records import read
from minilora.demo import DATA
from minilora.gguf.file import gguf_in, has_blocks
from minilora.hf.load import load_model, load_tokenizer, resolve
from minilora.hf.plan import load_config, load_trial, model_on_meta, on_this_machine
from minilora.hf.trials import BenchJob
from minilora.lora.inject import inject
from minilora.measure.bench import Side
from minilora.measure.meter import Meter
from minilora.measure.plan import own_memory, training_step
from minilora.measure.worker import Worker, anonymous_bytes, can_measure
from minilora.qlora.kbit import checkpoint_activations
from minilora.store.load import load_adapter, save_adapter

__all__ = ["BenchJob", "contestant", "run"]

_EVERY_TOKEN = 1 << 30  # no cut: examples are joined and cut into blocks later


def run(job: BenchJob, say: Callable[[str], None] = print) -> tuple[list[Side], list[str]]:
    """``(one side for each library that is installed, what could not be run)``; ``say`` gets a line at every step.

    Raises:
        MiniLoraError: no such model or data, a target that matches nothing, or a process that ended.
    """
    sides = {"minilora.hf.bench:serve": Side("minilora")}
    missing = _missing(job)
    if not missing:
        sides["minilora.hf.peers:serve"] = Side("PEFT" + " + bitsandbytes" * (job.quant != "none"))
    batches = _batches(job)
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.asdict(job) | {"start": f"{folder}/start", "batches": batches, "folder": folder}
        say("making the start adapter")
        with Worker("minilora.hf.bench:make_start", settings, job.threads) as worker:
            worker.ask("make")
        for repeat in range(job.repeats):
            _one_run(job, sides, settings, _numbered(say, f"run {repeat + 1}/{job.repeats}: "))
    return list(sides.values()), missing


def _missing(job: BenchJob) -> list[str]:
    file = gguf_in(resolve(job.model))
    if file and (has_blocks(file) or job.quant != "none"):
        return [
            f"{job.model} is a GGUF file, whose layers PEFT does not take, so minilora stands alone; name the dense model to see both"
        ]
    wanted = ["peft"] + ["bitsandbytes"] * (job.quant != "none")
    return [
        f"{name} is not installed, so minilora stands alone; run 'pip install {name}' to see it beside"
        for name in wanted
        if importlib.util.find_spec(name) is None
    ]


def _numbered(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda line: say(prefix + line)


def _one_run(job: BenchJob, sides: dict[str, Side], settings: dict[str, Any], say: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        workers = {}
        for target, side in sides.items():
            say(f"loading {job.model} in {side.name.split()[0]}")
            workers[target] = stack.enter_context(Worker(target, settings, job.threads))
            said = workers[target].ask("load")
            side.versions, side.libraries = said["versions"], said["libraries"]
            side.losses.append([])
            side.seconds.append([])
            side.cpu.append([])
        for step in range(job.steps):
            for target in list(sides)[:: -1 if step % 2 else 1]:  # the order turns at every step
                did = workers[target].ask("step")
                sides[target].losses[-1].append(did["loss"])
                sides[target].seconds[-1].append(did["seconds"])
                sides[target].cpu[-1].append(did["cpu"])
            words = [
                f"{s.name.split()[0]} {s.seconds[-1][-1]:.2f} s, loss {s.losses[-1][-1]:.4f}" for s in sides.values()
            ]
            say(f"step {step + 1}/{job.steps}  {'  |  '.join(words)}")
        for target, side in sides.items():
            done = workers[target].ask("finish")
            side.trainable, side.adapter = done["trainable"], done["adapter"]
            side.peak = max(side.peak or 0, done["peak"]) if done["peak"] is not None else None


def _batches(job: BenchJob) -> list[list[list[int]]]:
    """Token ids ``[steps][batch][seq]``: the data's examples one after another, cut into blocks, from the start again when they end."""
    wanted = job.steps * job.batch * job.seq
    if job.data == "random":
        most = load_config(job).get_text_config().vocab_size
        ids = torch.randint(0, most, (wanted,), generator=torch.Generator().manual_seed(job.seed)).tolist()
    else:
        records = read(DATA if job.data == "demo" else job.data)
        found = [
            i
            for e in encode_all(records, load_tokenizer(job.model, job.trust_remote_code), _EVERY_TOKEN)
            for i in e.input_ids
        ]
        ids = (found * -(-wanted // len(found)))[:wanted]
    return torch.tensor(ids).view(job.steps, job.batch, job.seq).tolist()


# ---- inside a worker


def job_of(settings: dict[str, Any]) -> BenchJob:
    """The job in a worker's settings."""
    names = {entry.name for entry in dataclasses.fields(BenchJob)}
    own: dict[str, Any] = {name: value for name, value in settings.items() if name in names}
    if isinstance(own["target_modules"], list):
        own["target_modules"] = tuple(own["target_modules"])
    return BenchJob(**own)


def make_start(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """A worker that writes the adapter from which every library starts."""

    def answer(request: str) -> dict[str, Any]:
        job, place = on_this_machine(job_of(settings))
        model = load_model(job.model, place.dtype, job.trust_remote_code, device=place.device)
        torch.manual_seed(job.seed)
        inject(model, job.lora())
        save_adapter(model, settings["start"])
        return {}

    return answer


def serve(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """minilora's side."""

    def load(job: BenchJob) -> Any:
        model = load_trial(*on_this_machine(job))
        load_adapter(model, settings["start"], is_trainable=True)
        return model

    return contestant(settings, {"minilora": __version__}, load, save_adapter)


def contestant(
    settings: dict[str, Any],
    versions: dict[str, str],
    load: Callable[[BenchJob], Any],
    save: Callable[[Any, Path], object],
) -> Callable[[str], dict[str, Any]]:
    """Answers "load", "step" and "finish" for one library, given its versions. Step, optimizer and loss are the same for all."""
    job, place = on_this_machine(job_of(settings))
    steps, meter = iter(settings["batches"]), Meter(place.device)
    held: dict[str, Any] = {}

    def start() -> dict[str, Any]:
        model_on_meta(job)  # imports what loading will import
        training_step(
            tiny := nn.Linear(2, 2), torch.optim.AdamW(tiny.parameters()), lambda m: m(torch.ones(1, 2)).sum()
        )
        held["libraries"] = anonymous_bytes() if can_measure() else None
        held["start"] = meter.held() if meter.works else 0
        model = held["model"] = load(job).train()
        own_memory(model)
        if job.gradient_checkpointing:
            checkpoint_activations(model)
        held["optimizer"] = torch.optim.AdamW(_trained(model), lr=job.lr, weight_decay=0.0)
        if meter.works:
            meter.reset()
        return {"versions": versions, "libraries": held["libraries"]}

    def step() -> dict[str, Any]:
        ids = torch.tensor(next(steps), device=place.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
        began, ran = time.perf_counter(), time.process_time()
        loss = training_step(held["model"], held["optimizer"], lambda model: model(**batch).loss).item()
        return {"loss": loss, "seconds": time.perf_counter() - began, "cpu": time.process_time() - ran}

    def finish() -> dict[str, Any]:
        peak = meter.peak() - held["start"] if meter.works else None
        folder = Path(settings["folder"]) / f"{next(iter(versions))}-trained"
        save(held["model"], folder)
        files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "README.md")
        return {"peak": peak, "trainable": sum(p.numel() for p in _trained(held["model"])), "adapter": files}

    return lambda request: {"load": start, "step": step, "finish": finish}[request]()


def _trained(model: nn.Module) -> Sequence[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
