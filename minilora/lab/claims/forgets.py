"""LoRA forgets less than full fine-tuning that has learnt as much."""

import itertools
import math

from minilora.lab.claim import UNDECIDED, Claim, Curve, Finding, Picture, above
from minilora.lab.ground import RATES, Ground, Tuned
from minilora.lab.interval import interval
from minilora.lab.variants import LORA

CLAIM = Claim(
    name="forgets",
    sentence="At equal held-out loss, LoRA moves less than full fine-tuning on the text that the model was trained on.",
    source="Biderman et al. 2024, arXiv 2405.09673, abstract",
    number="less forgetting, at less learning too; here learning is made equal",
)


def run(ground: Ground) -> Finding:
    # The rates of full-rate, so no trial is new beside it.
    lora = ground.tune({"LoRA": LORA}, (*RATES, 3e-2))["LoRA"]
    full = ground.tune({"full": {"variant": "full"}}, (1e-4, *RATES))["full"]
    rows, ratios = [], []
    for seed in lora.losses:
        paths = {own.name: path(own, seed) for own in (lora, full)}
        if any(len(points) == 1 for points in paths.values()):
            return Finding(UNDECIDED, f"One of the two learnt nothing at any rate with seed {seed}.")
        level = max(min(loss for loss, _ in points) for points in paths.values())  # the least loss that both reach
        at = {name: forgetting_at(points, level) for name, points in paths.items()}
        rows.append({"seed": seed, "held-out loss": level} | {f"forgetting of {name}": kl for name, kl in at.items()})
        ratios.append(math.log(at["full"] / at["LoRA"]))
    log = interval(ratios)
    said = (
        f"At equal held-out loss full fine-tuning has forgotten {math.exp(log.mean):.2f} times what LoRA has "
        f"({math.exp(log.low):.2f} to {math.exp(min(log.high, 99)):.2f}), as KL(base || adapted) on held-out prose."
    )
    curves = [
        Curve(own.name, [(loss, kl, kl, kl) for loss, kl in path(own, next(iter(own.losses)))]) for own in (lora, full)
    ]
    picture = Picture("held-out loss (nats a byte), the first seed", "forgetting (nats a byte)", curves)
    return Finding(above(log, 0), said, rows, picture)


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
