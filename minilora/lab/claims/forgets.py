"""LoRA forgets less than full fine-tuning that has learnt as much."""

import itertools
import math

from minilora.lab.ground.claim import UNDECIDED, Claim, Curve, Finding, Picture, above, all_of
from minilora.lab.ground.ground import RATES, Ground, Tuned
from minilora.lab.variants import LORA
from minilora.lab.verdicts.interval import interval

CLAIM = Claim(
    name="forgets",
    sentence="At equal held-out loss, LoRA moves less than full fine-tuning on the text that the model was trained on.",
    source="Biderman et al. 2024, arXiv 2405.09673, abstract",
    number="less forgetting, at less learning too; here learning is made equal",
)


# Of the learning that both reach. At all of it the one that learns less is at its best rate, where it forgets more for next to nothing.
SHARES = (0.9, 1.0)


def run(ground: Ground) -> Finding:
    # The rates of full-rate, so no trial is new beside it.
    lora = ground.tune({"LoRA": LORA}, (*RATES, 3e-2))["LoRA"]
    full = ground.tune({"full": {"variant": "full"}}, (1e-4, *RATES))["full"]
    rows = []
    for seed in lora.losses:
        paths = {own.name: path(own, seed) for own in (lora, full)}
        if any(len(points) == 1 for points in paths.values()):
            return Finding(UNDECIDED, f"One of the two learnt nothing at any rate with seed {seed}.")
        least = max(points[-1][0] for points in paths.values())
        for share in SHARES:
            level = max(
                least, lora.before - share * (lora.before - least)
            )  # rounding must not go below what is reached
            at = {f"forgetting of {name}": forgetting_at(points, level) for name, points in paths.items()}
            rows.append({"seed": seed, "share of the learning": share, "held-out loss": level} | at)
    said, parts = [], []
    for share in SHARES:
        own = [row for row in rows if row["share of the learning"] == share]
        log = interval([math.log(row["forgetting of full"] / row["forgetting of LoRA"]) for row in own])
        parts.append(above(log, 0))
        ends = f"{math.exp(log.low):.2f} to {math.exp(min(log.high, 99)):.2f}"
        said.append(f"{math.exp(log.mean):.2f} times ({ends}) at {share:.0%} of it: {parts[-1]}")
    words = f"Where both have learnt as much, full fine-tuning has forgotten, of what LoRA has, {'; '.join(said)}."
    first = next(iter(lora.losses))
    curves = [Curve(own.name, [(loss, kl, kl, kl) for loss, kl in path(own, first)]) for own in (lora, full)]
    picture = Picture(f"held-out loss (nats a byte), seed {first}", "forgetting (nats a byte)", curves)
    return Finding(all_of(parts), words, rows, picture)


def path(tuned: Tuned, seed: int) -> list[tuple[float, float]]:
    """``(held-out loss, forgetting)`` of one seed from no training up to the best rate: beyond it both get worse."""
    points = [(tuned.before, 0.0)]
    for rate in sorted(tuned.results):
        result = tuned.results[rate][seed]
        if result.eval_loss is not None and result.eval_loss < points[-1][0]:
            points.append((result.eval_loss, result.measured["forgetting"]))
        else:
            break
    return points


def forgetting_at(points: list[tuple[float, float]], level: float) -> float:
    """The forgetting where a path crosses a held-out loss, between two of its points.

    The root of the divergence is taken to be straight there, as it begins: a small step lowers the loss by its length, and diverges by the
    square of it. A straight line of the divergence itself would lie above, and hold that against whichever is interpolated.
    """
    for (loss, kl), (lower, more) in itertools.pairwise(points):
        if lower <= level <= loss:
            low, high = math.sqrt(kl), math.sqrt(more)
            return float(low + (high - low) * (loss - level) / (loss - lower)) ** 2
    return math.nan
