"""Rank 1 holds a little and no more: facts learnt by heart, few and many."""

from __future__ import annotations

import math
from collections.abc import Mapping

from minilora.lab.byte_model import facts, line_examples
from minilora.lab.byte_model.texts import FACT_BITS
from minilora.lab.claim import Claim, Curve, Finding, Picture, above, all_of, within
from minilora.lab.ground import RATES, Ground, Tuned
from minilora.lab.interval import interval, told_apart

CLAIM = Claim(
    name="rank-1",
    sentence="Rank 1 learns as well as rank 16 what fits into its parameters, at about 2 bits each, and worse what does not.",
    source="Schulman et al. 2025, LoRA Without Regret, section on capacity; Hu et al. 2021, LoRA, arXiv 2106.09685, section 7.2",
    number="2 bits a parameter; rank 1 is enough for the query and value layers",
)
RANKS = (1, 16)
# Of the query and value layers rank 1 has 1,792 numbers, 3,584 bits at 2 bits each: 112 facts.
WHERE = {"target_modules": ["q_proj", "v_proj"]}
FEW, MANY = 16, 192  # a seventh of that, and nearly twice as much
PASSES = 3  # so many times as long as other runs
SAME = 0.05  # share of the bits


def run(ground: Ground) -> Finding:
    tuned = {count: _tuned(ground, count) for count in (FEW, MANY)}
    known = {
        (count, r): shares(found[f"r={r}"].losses) for count, found in tuned.items() for r in RANKS
    }
    verdicts = {
        "few": within(told_apart(known[FEW, 1], known[FEW, 16]).interval, SAME),
        "many": above(told_apart(known[MANY, 1], known[MANY, 16]).interval, SAME),
    }
