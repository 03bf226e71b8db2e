"""LoRA's best learning rate is about ten times that of full fine-tuning."""

import math

from minilora.lab.ground.claim import UNDECIDED, Claim, Finding, within
from minilora.lab.ground.ground import RATES, Ground, Tuned, loss_picture
from minilora.lab.variants import LORA
from minilora.lab.verdicts.interval import Interval, interval

CLAIM = Claim(
    name="full-rate",
    sentence="The best learning rate of LoRA is about ten times (five to twenty times) that of full fine-tuning.",
    source="Schulman et al. 2025, LoRA Without Regret, section on the optimal learning rate",
    number="10 times; 15 times in short runs",
)
TIMES, FACTOR = 10.0, 2.0  # what is claimed, and by what factor a ratio may miss it and still be about that


def run(ground: Ground) -> Finding:
    lora = ground.tune({"LoRA": LORA}, (*RATES, 3e-2))["LoRA"]
    full = ground.tune({"full": {"variant": "full"}}, (1e-4, *RATES))["full"]
    best = {own.name: vertices(own) for own in (lora, full)}
    rows = [{"tuned": own.name, "best rate of the grid": own.rate, **named(best[own.name])} for own in (lora, full)]
    picture = loss_picture((lora, full))
    ratios = [math.log(ours / theirs) for ours, theirs in zip(*(own.values() for own in best.values()), strict=True)]
    if not all(map(math.isfinite, ratios)):
        said = "The best rate of a seed is the lowest or highest that was tried, so it may lie beyond."
        return Finding(UNDECIDED, said, rows, picture)
    log = interval(ratios)
    verdict = within(shifted(log, -math.log(TIMES)), math.log(FACTOR))
    said = f"LoRA's best rate is {math.exp(log.mean):.1f} times that of full fine-tuning ({times(log.low)} to {times(log.high)})."
    return Finding(verdict, said, rows, picture)


def vertices(tuned: Tuned) -> dict[int, float]:
    """The best rate of each seed: the lowest point of a parabola in log(rate) through the best of the grid and its neighbours.

    The grid alone knows the rate to a factor of three. NaN where the best of the grid is at an end of it.
    """
    rates = sorted(tuned.results)
    found = {}
    for seed in tuned.losses:
        losses = [tuned.losses_at(rate)[seed] for rate in rates]
        at = losses.index(min(losses))
        found[seed] = math.nan
        if 0 < at < len(rates) - 1 and math.isfinite(losses[at + 1] + losses[at - 1]):
            (x0, x1, x2), (y0, y1, y2) = ([math.log(rate) for rate in rates[at - 1 : at + 2]], losses[at - 1 : at + 2])
            up, down = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
            found[seed] = (
                math.exp(x1 - ((x1 - x0) * up - (x1 - x2) * down) / (2 * (up - down))) if up != down else rates[at]
            )
    return found


def named(rates: dict[int, float]) -> dict[str, float]:
    return {f"seed {seed}": rate for seed, rate in rates.items()}


def shifted(of: Interval, by: float) -> Interval:
    return Interval(of.mean + by, of.low + by, of.high + by, of.spread, of.count)


def times(log: float) -> str:
    """A ratio of which the logarithm is given; an end of an interval may be too far for a float."""
    return f"{math.exp(log):.1f}" if log < 20 else "more than a million"
