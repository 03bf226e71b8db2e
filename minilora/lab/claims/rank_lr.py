"""The best learning rate does not depend on the rank."""

from minilora.lab.ground.claim import Claim, Finding, all_of, within
from minilora.lab.ground.ground import RATES, Ground, loss_picture
from minilora.lab.verdicts.interval import interval, told_apart

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
    costs = {name: told_apart(family.losses, family.losses_at(usual)).interval for name, family in tuned.items()}
    rows = []
    for name, family in tuned.items():
        there = {"best rate": family.rate, "loss there": interval(family.losses.values())}
        rows.append({"rank": name} | there | {"cost of the rate of r=16": costs[name]})
    rates = ", ".join(f"{name}: {family.rate:g}" for name, family in tuned.items())
    worst = max(cost.mean for cost in costs.values())
    said = f"Best rates: {rates}; training every rank at that of r=16 costs at most {worst:.4f} nats a byte."
    picture = loss_picture(tuned.values())
    return Finding(all_of([within(cost, COST) for cost in costs.values()]), said, rows, picture)
