"""Intruder dimensions: first singular directions of ``W + dW`` that no singular direction of W is like."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from minilora.lab.ground.claim import Claim, Curve, Finding, Picture, above, all_of
from minilora.lab.ground.ground import RATES, SEEDS, Ground
from minilora.lab.measures import intruder_dimensions
from minilora.lab.sweeps.trial import Result
from minilora.lab.verdicts.interval import Interval, interval, slope
from minilora.lora.inject import inject
from minilora.store.save import adapter_state_dict

CLAIM = Claim(
    name="intruders",
    sentence="LoRA brings more intruder dimensions at a higher learning rate, at every rank.",
    source="Shuttleworth et al. 2024, LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228, section 4",
    number="many among the first 10 directions, next to none in full fine-tuning",
)
RANKS = (1, 4, 16, 64)
ALL_RATES = (*RATES, 3e-2)  # with RANKS the runs of the claim on rank and rate, so these are done once


def run(ground: Ground) -> Finding:
    tuned = ground.tune({f"r={r}": {"r": r} for r in RANKS}, ALL_RATES)
    rows: list[dict[str, Any]] = []
    at_best: dict[float, dict[int, int]] = {}
    curves, verdicts = [], []
    for r, (name, family) in zip(RANKS, tuned.items(), strict=True):
        counts = {
            rate: {seed: count(ground, result) for seed, result in by_seed.items() if not result.ended}
            for rate, by_seed in family.results.items()
        }
        tenfold = growth(counts)
        verdicts.append(above(tenfold, 0.0))
        at_best[r] = counts[family.rate]
        means = {f"{rate:g}": _mean(found) for rate, found in counts.items() if found}
        rows.append({"rank": name, "best rate": family.rate, "a tenfold rate adds": tenfold} | means)
        points = [(rate, _mean(n), min(n.values()), max(n.values())) for rate, n in counts.items() if n]
        curves.append(Curve(name, points))
    by_rank = growth(at_best)
    said = "A tenfold rate adds " + ", ".join(f"{row['a tenfold rate adds'].mean:+.1f} ({row['rank']})" for row in rows)
    said += " intruders among the first 10 directions of all layers; at the best rates a tenfold rank adds "
    said += f"{by_rank.mean:+.1f} ({by_rank.low:+.1f} to {by_rank.high:+.1f})."
    picture = Picture("learning rate", "intruder dimensions, of all layers", curves, log_x=True)
    return Finding(all_of(verdicts), said, rows, picture)


def growth(counts: dict[float, dict[int, int]]) -> Interval:
    """The line through the counts over the decimal logarithm of what they are at, by seed; a run that diverged is left out."""
    slopes = []
    for seed in SEEDS:
        points = [(math.log10(at), found[seed]) for at, found in counts.items() if seed in found]
        if len(points) > 1:
            slopes.append(slope(points))
    return interval(slopes)


def count(ground: Ground, result: Result) -> int:
    """The intruders of a trial's adapter, of all layers together."""
    assert result.trial.lora is not None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = inject(copy.deepcopy(ground.model), result.trial.lora)
        for name, value in adapter_state_dict(model).items():
            value.copy_(result.weights[name])
    return sum(found.count for found in intruder_dimensions(model).values())


def _mean(found: dict[int, int]) -> float:
    return math.fsum(found.values()) / len(found)
