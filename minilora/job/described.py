"""What a job's report tells: its headline, tables, settings and versions, in the form that ``report/page.py`` draws."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minilora.data.sources.names import several
from minilora.job.outcome import Outcome
from minilora.job.settings import Job
from minilora.linear.layers import is_quantized
from minilora.report.inspect import memory_table
from minilora.training.optim import make_optimizer
from minilora.training.optim_state import state_bytes

__all__ = ["described", "formats", "memory"]


def memory(job: Job, model: Any) -> list[dict[str, Any]]:
    """What a model holds, and what the state of its optimizer will."""
    optimizer = make_optimizer(job.training, [parameter for parameter in model.parameters() if parameter.requires_grad])
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
    trainable, total = (sum(row[kind] for row in tables["parameters"]) for kind in ("trainable", "total"))
    losses = outcome.losses
    change = f"{losses[0]:.2f} → {losses[-1]:.2f}" if losses else "not logged"
    memory = [{"name": "weights, if none were packed", "bytes": dense_bytes, "note": job.dtype}, *tables["memory"]]
    evals = [
        {"prompt": None, "answer": None} | r | {"loss": r["eval_loss"]} for r in outcome.records if "eval_loss" in r
    ]
    return {
        "title": f"minilora: {job.model}",
        "subtitle": f"{', '.join(several(job.data))} · {time.strftime('%Y-%m-%d %H:%M')} · adapter in {job.out}",
        "headline": [
            {"label": "training loss", "value": change},
            {"label": "parameters trained", "value": f"{trainable:,} of {total:,}"},
            {"label": "time", "value": f"{sum(outcome.seconds.values()):.0f} s"},
            {"label": "peak memory", "value": f"{outcome.peak_mb / 1000:.2f} GB"},
        ],
        "steps": [record for record in outcome.records if "loss" in record],
        "evals": evals,
        "answers": outcome.answers,
        "memory": [
            *memory,
            {"name": "peak of the process", "bytes": int(outcome.peak_mb * 1e6), "note": "all of it, loading included"},
        ],
        "parameters": tables["parameters"],
        "layers": [{"path": path, "ratio": ratio} for path, ratio in ratios.items()],
        "spectrum": [{"path": path, "values": list(found)} for path, found in values.items()],
        "settings": _settings(job)
        | {"quant": tables["formats"] or "none"}
        | {f"seconds: {name}": round(spent, 1) for name, spent in outcome.seconds.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
    }


def _settings(job: Job) -> dict[str, Any]:
    kept = ("quant", "double_quant", "device", "dtype", "attention", "max_length", "truncate", "eval_share", "system")
    own = {name: getattr(job, name) for name in kept}
    lora = {name: getattr(job.lora, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")}
    return own | lora | vars(job.training)
