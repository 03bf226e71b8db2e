"""The fair table of variants: each tunes its rate with the same budget, and is compared with LoRA seed by seed.

    rows = fair_table(Ground(), ["lora", "dora", "mine"])        # "mine" is registered by @register("mine")
    print(as_csv(rows))

A variant is called better or worse only where the interval of its paired differences from LoRA leaves out 0. The level is 95 % for each
comparison, so of twenty variants that equal LoRA one is expected to be told from it by chance. Next file: ``lab/ground/claim.py``.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilora.errors import ConfigError, StateError
from minilora.lab.cost import Cost, costs
from minilora.lab.ground.ground import RATES, SEEDS, Ground, Tuned
from minilora.lab.verdicts.interval import Interval, interval, told_apart
from minilora.lora.adapter import variant
from minilora.lora.config import LoraConfig
from minilora.lora.starts import CordaConfig, EvaConfig, LoraGAConfig

__all__ = ["BETTER", "KNOWN", "LORA", "NOT_TOLD", "WORSE", "against", "as_csv", "fair_table", "families"]

BETTER, WORSE, NOT_TOLD = "better", "worse", "not told from LoRA"
LORA = {"r": 16}
# What a name means beside a rank of 16. VeRA and LoRA-XS train so few numbers for a rank that they are made for larger ones.
KNOWN: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora+": {"loraplus_lr_ratio": 16.0},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora_fa": {"variant": "lora_fa"},
    "vera": {"variant": "vera", "r": 64},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    "lora_xs": {"variant": "lora_xs", "r": 64},
    "mica": {"init_lora_weights": "mica"},
}


def families(variants: Iterable[str] | Mapping[str, LoraConfig | str]) -> dict[str, dict[str, Any]]:
    """The fields of ``Ground.trial`` that each variant means, by name.

    Raises:
        ConfigError: a name that is neither known here nor registered, or that stands twice.
    """
    given = variants if isinstance(variants, Mapping) else _once(variants)
    made = {}
    for name, what in given.items():
        if isinstance(what, LoraConfig):
            made[name] = {field.name: getattr(what, field.name) for field in dataclasses.fields(what)}
        elif what == "full":
            made[name] = {"variant": "full"}
        elif what in KNOWN:
            made[name] = LORA | KNOWN[what]
        else:
            variant(what)
            made[name] = LORA | {"variant": what}
    return made


def fair_table(
    ground: Ground,
    variants: Iterable[str] | Mapping[str, LoraConfig | str] | None = None,
    budget: int = len(RATES),
    seeds: Sequence[int] = SEEDS,
) -> list[dict[str, Any]]:
    """A row for each variant, LoRA first.

    Args:
        variants: names in KNOWN or of registered variants, which get rank 16, and "full", which is full fine-tuning; or a mapping of
            names of your choice to such names and to configs. None is all in KNOWN. The others are compared with "lora", which has r = 16
            and lora_alpha = 32 if it is not given.
        budget: how many rates each variant is tried at, at least 3 (``Ground.tune_alike``). seeds: at least 2.

    Returns:
        Rows of equal keys. Of type ``Interval``: ``loss``, held out, at the best rate, nats a byte; ``difference``, the loss less that of
        LoRA with the same seed; ``forgetting``, KL(base || adapted) on the text that the base knows, nats a byte; ``seconds a step``, by
        itself. The first three are None where a trial ended early, and ``note`` says why. ``peak bytes`` of a step and ``parameters``
        are exact. ``verdict``: BETTER or WORSE than LoRA, or NOT_TOLD; "" for LoRA itself.

    Raises:
        ConfigError: a variant that is not known, or that this model cannot have, by name and before any is trained; fewer than 2 seeds.
        StateError: LoRA itself diverged.
    """
    if len(set(seeds)) < max(2, len(seeds)):
        raise ConfigError(f"seeds={list(seeds)}: wanted two or more that differ, for an interval")
    asked = {"lora": LORA} | families(list(KNOWN) if variants is None else variants)
    trials = {name: ground.trial(RATES[1], seeds[0], **fields) for name, fields in asked.items()}
    spent = costs(ground.model, ground.lesson, trials, rounds=len(seeds))
    tuned = ground.tune_alike(asked, budget, seeds)
    if note := _note(tuned["lora"]):
        raise StateError(f"LoRA itself did not come to its end, and nothing can be compared with it: {note}")
    return [_row(name, tuned["lora"], own, spent[name]) for name, own in tuned.items()]


def against(lora: Mapping[int, float], own: Mapping[int, float]) -> tuple[Interval, str]:
    """How much larger the own losses are than LoRA's of the same seeds, and the verdict."""
    difference = told_apart(lora, own).interval
    return difference, BETTER if difference.high < 0 else WORSE if difference.low > 0 else NOT_TOLD


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as CSV; an interval becomes three columns: the mean, and its ends with "low" and "high" behind the name."""
    with_ends = {key for row in rows for key, value in row.items() if isinstance(value, Interval)}
    made = [dict(_cells(row, with_ends)) for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(made[0]) if made else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    return file.getvalue()


def _once(names: Iterable[str]) -> dict[str, str]:
    given = [names] if isinstance(names, str) else list(names)
    if twice := [name for name in given if given.count(name) > 1]:
        raise ConfigError(f"variant {twice[0]!r} stands there twice; give each once")
    return {name: name for name in given}


def _row(name: str, lora: Tuned, own: Tuned, cost: Cost) -> dict[str, Any]:
    note = _note(own)
    difference, verdict = (None, NOT_TOLD) if note else against(lora.losses, own.losses)
    edge = "a better rate may lie beyond the lowest or highest of all" if own.outwards else ""
    trial = next(iter(own.results[own.rate].values())).trial
    return {
        "variant": name,
        "verdict": "" if name == "lora" else verdict,
        "loss": None if note else interval(own.losses.values()),
        "difference": None if name == "lora" else difference,
        "forgetting": None if note else interval(own.measured("forgetting").values()),
        "seconds a step": interval(cost.seconds),
        "peak bytes": cost.memory,
        "parameters": cost.parameters,
        "r": trial.lora.r if trial.lora else "",
        "rate": own.rate,
        "rates tried": len(own.results),
        "note": note or edge,
    }


def _note(own: Tuned) -> str:
    """Why not every seed came to its end with a finite loss, at the best rate; "" if all did."""
    return next(
        (
            f"seed {seed}, rate {own.rate:g}: {own.results[own.rate][seed].ended or 'the loss is not finite'}"
            for seed, loss in own.losses.items()
            if not math.isfinite(loss)
        ),
        "",
    )


def _cells(row: Mapping[str, Any], with_ends: set[str]) -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        if key not in with_ends:
            yield key, "" if value is None else value
        else:
            ends = (value.mean, value.low, value.high) if isinstance(value, Interval) else ("", "", "")
            yield from zip((key, f"{key} low", f"{key} high"), ends, strict=True)
