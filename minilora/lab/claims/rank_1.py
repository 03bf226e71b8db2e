"""Rank 1 is enough for a little: facts learnt by heart, few and many, 32 random bits each.

What is known of a fact is a lower bound of what the adapter holds: its bits, less those that the loss says are still missing.
"""

from __future__ import annotations

import math
from typing import Any

from minilora.lab.byte_model import facts, line_examples
from minilora.lab.byte_model.texts import FACT_BITS
from minilora.lab.ground.claim import Claim, Finding, above, all_of, within
from minilora.lab.ground.ground import Ground
from minilora.lab.verdicts.interval import interval, told_apart

CLAIM = Claim(
    name="rank-1",
    sentence="For few facts rank 1 learns as well as rank 16, and for many it does not.",
    source="Schulman et al. 2025, LoRA Without Regret, section on capacity",
    number="about 2 bits a parameter can be held; a rank falls behind where the data exceeds them",
)
RANKS = (1, 16)
RATES = (1e-3, 3e-3, 1e-2)
FEW, MANY = 16, 256  # so many that a run of this length ends before any rank knows them all
LONGER = 5 / 3  # than other runs: by heart needs many passes, and a batch of facts is as long as 8 pieces of text
ROOM = 2.0  # bits that a parameter can hold, as the source says
SAME = 0.05  # share of the bits of all facts that counts as no difference


def run(ground: Ground) -> Finding:
    known: dict[tuple[int, int], dict[int, float]] = {}
    rows: list[dict[str, Any]] = []
    for count in (FEW, MANY):
        lesson = line_examples(facts(count, 0))
        plan = {"steps": round(LONGER * ground.steps), "batch_size": min(count, 64)}
        families = {f"r={r}": {"r": r} | plan for r in RANKS}
        tuned = ground.tune(families, RATES, lesson=lesson, key=f"{count} facts")
        for r, family in zip(RANKS, tuned.values(), strict=True):
            known[count, r] = {seed: share_known(loss) for seed, loss in family.losses.items()}
            share = interval(known[count, r].values())
            held = share.mean * count * FACT_BITS / family.results[family.rate][0].parameters
            rows.append(
                {
                    "facts": count,
                    "r": r,
                    "best rate": family.rate,
                    "share of bits known": share,
                    "bits a parameter": held,
                }
            )
    gains = {count: told_apart(known[count, 1], known[count, 16]).interval for count in (FEW, MANY)}
    said = "; ".join(
        f"of {count} facts rank 1 knows {interval(known[count, 1].values()).mean:.1%} of the bits and rank 16 {gain.mean:+.1%} more"
        for count, gain in gains.items()
    )
    most = max(row["bits a parameter"] for row in rows if row["r"] == 1)
    said += f"; rank 1 came to {most:.2f} bits a parameter"
    said += ", so the length of the run ended it, and not its room." if most < ROOM else "."
    # A difference of either sign is none if it is small, for few facts; for many it has to be rank 16's.
    return Finding(all_of([within(gains[FEW], SAME), above(gains[MANY], SAME)]), said, rows)


def share_known(loss: float) -> float:
    """Of a fact's bits, from its loss in nats a byte: the value has 8 bytes, and its line end is learnt, too."""
    return max(0.0, 1 - 9 * loss / math.log(2) / FACT_BITS)
