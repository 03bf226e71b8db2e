"""The best learning rate does not depend on the rank."""

from typing import Any

from minilora.lab.claim import Claim, Curve, Finding, Picture, all_of, within
from minilora.lab.ground import RATES, Ground
from minilora.lab.interval import told_apart

CLAIM = Claim(
    name="rank-lr",
    sentence="With scaling alpha/r, the best learning rate of LoRA is the same for every rank.",
    source="Schulman et al. 2025, LoRA Without Regret, section on the optimal learning rate and rank",
    number="one rate for ranks 1 to 512, alpha = 32",
)
RANKS = (1, 4, 16, 64)
COST = 0.01  # nats a byte: what taking the rate of another rank may cost and still count as nothing


def run(ground: Ground) -> Finding:
    tuned = ground.tune({f"r={r}": {"r": r} for r in RANKS}, (*RATES, 3e-2))
    usual = tuned["r=16"].rate
    rows: list[dict[str, Any]] = []
    verdicts = []
    for name, family in tuned.items():
        cost = told_apart(family.losses, family.losses_at(usual)).interval
        verdicts.append(within(cost, COST))
        rows.append(
            {"rank": name, "best rate": family.rate, "loss there": family.losses, "cost of the rate of r=16": cost}
        )
    rates = ", ".join(f"{row['rank']}: {row['best rate']:g}" for row in rows)
    worst = max(row["cost of the rate of r=16"].mean for row in rows)
    said = f"Best rates: {rates}; training every rank at that of r=16 costs at most {worst:.4f} nats a byte."
    curves = [Curve(name, family.curve()) for name, family in tuned.items()]
    return Finding(
        all_of(verdicts), said, rows, Picture("learning rate", "held-out loss (nats a byte)", curves, log_x=True)
    )
