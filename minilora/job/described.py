"""What a job's report tells: its headline, tables, settings and versions, in the form that ``report/page.py`` draws."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.data.sources.names import several
from minilora.hf.versions import versions
from minilora.job.outcome import Outcome
from minilora.job.settings import Job
from minilora.job.start import vars_of
from minilora.linear.layers import is_quantized
from minilora.report.inspect import memory_table
from minilora.training.optim_choice import optimizer_of
from minilora.training.optim_state import state_bytes

__all__ = ["described", "formats", "memory", "report_settings"]

# Phases of ``Outcome.peaks_mb`` that count as one, and what was in them.
_PEAKS = {
    "loading": (("load", "inject"), "reading and packing the model"),
    "training": (("train",), "steps, evaluations and saves"),
}


def memory(job: Job, model: Any) -> list[dict[str, Any]]:
    """What a model holds, and what the state of its optimizer will."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = optimizer_of(model, named, job.training)
    return memory_table(model, (f"state of {job.training.optimizer}", state_bytes(optimizer)))


def formats(model: Any) -> str:
    """The formats of a model's packed layers, "" if none is packed."""
    return ", ".join(sorted({module.format for module in model.modules() if is_quantized(module)}))


def described(
    job: Job,
    outcome: Outcome,
    dense_bytes: int,
    tables: Mapping[str, Any],
    ratios: Mapping[str, float],
    values: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What ``report.render`` draws of a run; ``tables`` are of the model while all of it was here."""
    peaks, made = _peaks(outcome), versions()
    trainable, total = (sum(row[kind] for row in tables["parameters"]) for kind in ("trainable", "total"))
    memory = [{"name": "weights, if none were packed", "bytes": dense_bytes, "note": job.dtype}, *tables["memory"]]
    evals = [
        {"prompt": None, "answer": None} | r | {"loss": r["eval_loss"]} for r in outcome.records if "eval_loss" in r
    ]
    return {
        "title": f"minilora: {job.model}",
        "subtitle": f"{', '.join(several(job.data))} · {time.strftime('%Y-%m-%d %H:%M')} · adapter in {job.out}"
        f" · minilora {made['minilora']}",
        "headline": [
            {"label": "training loss", "value": _change(outcome.losses, "not logged")},
            {"label": "held-out loss", "value": _change(outcome.held_out, "nothing held out")},
            {"label": "parameters trained", "value": f"{_count(trainable)} of {_count(total)}"},
            {"label": "time", "value": _time(outcome)},
            *[{"label": f"peak memory, {name}", "value": f"{peak / 1000:.2f} GB"} for name, peak in peaks.items()],
        ],
        "steps": [record for record in outcome.records if "loss" in record],
        "evals": evals,
        "answers": outcome.answers,
        "memory": [
            *memory,
            *[
                {"name": f"peak of the process, {name}", "bytes": int(peak * 1e6), "note": _PEAKS[name][1]}
                for name, peak in peaks.items()
            ],
        ],
        "parameters": tables["parameters"],
        "layers": [{"path": path, "ratio": ratio} for path, ratio in ratios.items()],
        "spectrum": [{"path": path, "values": list(found)} for path, found in values.items()],
        "settings": report_settings(job)
        | {"quant": tables["formats"] or "none"}
        | {f"seconds: {name}": round(spent, 1) for name, spent in outcome.seconds.items()},
        "versions": made | {"machine": platform.machine()},
    }


def report_settings(job: Job) -> dict[str, Any]:
    """The settings that make the run, by name."""
    kept = ("quant", "double_quant", "device", "dtype", "attention", "max_length", "truncate", "eval_share", "system")
    own = {name: getattr(job, name) for name in kept}
    lora = {name: getattr(job.lora, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")}
    usual = type(job.lora)()
    lora |= {name: value for name, value in vars_of(job.lora).items() if value != getattr(usual, name)}
    lora |= {name: getattr(job, name) for name in ("variant", "init_from") if getattr(job, name)}
    return own | lora | vars(job.training)


def _change(losses: Sequence[float | None], without: str) -> str:
    """From the first loss to the last."""
    ends = ["not finite" if loss is None else f"{loss:.2f}" for loss in (*losses[:1], *losses[1:][-1:])]
    return " → ".join(ends) or without


def _count(number: int) -> str:
    """In thousands, millions or billions, with three digits; the table of parameters has all of them."""
    for size, sign in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{sign}"
    return str(number)


def _time(outcome: Outcome) -> str:
    parts = f" in {outcome.sessions} sessions" if outcome.sessions > 1 else ""
    return f"{sum(outcome.seconds.values()):.0f} s{parts}"


def _peaks(outcome: Outcome) -> dict[str, float]:
    """Most memory of loading and of training, in MB, where the system says it."""
    found = {
        name: max((outcome.peaks_mb.get(phase, 0.0) for phase in phases), default=0.0)
        for name, (phases, _) in _PEAKS.items()
    }
    return {name: peak for name, peak in found.items() if peak}
